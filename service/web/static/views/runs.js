/** All runs, in the order and with the filters of the address, so that a link shows the same list. */

import { ask, query } from "../api.js";
import { html, useState } from "../lib.js";
import { projectName, projectOf, useProjects } from "../parts/projects.js";
import { Choices, Meter, Notice, StatePill } from "../parts/small.js";
import { useNow, usePolled } from "../polling.js";
import { age, decimal, dollars, moment, plural } from "../words.js";

const REFRESH_SECONDS = 3;
const PAGE = 50;
/** Maximum number of runs in one response. */
const MOST = 200;
const STATES = ["queued", "starting", "running", "stopping", "succeeded", "failed", "cancelled"];
const STATE_CHOICES = [["", "all"], ...STATES.map((state) => [state, state])];
const ORDERS = [["", "newest first"], ["perplexity", "lowest perplexity"], ["dollars", "cheapest"], ["-dollars", "most expensive"],
  ["-tokens", "most tokens"]];
/** Maximum number of runs that are compared. */
const COMPARED = 5;

/** @param {{filter: Record<string, string>}} props `filter`: `name`, `state`, `project`, `where` and `order_by` of the address. */
export function RunsView({ filter }) {
  const { name = "", state = "", project = "", where = "", order_by: order = "" } = filter;
  const projects = useProjects();
  const [wanted, setWanted] = useState(PAGE);
  const [chosen, setChosen] = useState([]);
  const conditions = where.split(/[\s,;]+/).filter(Boolean);
  const asked = { state, project, name: name.trim(), where: conditions, order_by: order };
  const { value: list, problem } = usePolled((signal) => found(wanted, asked, signal), REFRESH_SECONDS, [JSON.stringify(asked), wanted]);
  const now = useNow(5);
  const choose = (field) => (value) => {
    setWanted(PAGE);
    const fields = Object.entries({ ...filter, [field]: value }).filter(([, each]) => each !== "");
    // The list stays in place, so no entry of the history per letter
    history.replaceState(null, "", fields.length ? `#/runs?${new URLSearchParams(fields)}` : "#/runs");
    dispatchEvent(new HashChangeEvent("hashchange"));
  };
  const toggle = (id) => setChosen(chosen.includes(id) ? chosen.filter((each) => each !== id) : [...chosen, id]);
  const filtered = state !== "" || project !== "" || name.trim() !== "" || conditions.length > 0;
  return html`
    <div class="heading">
      <div class="lead"><h1>Runs</h1></div>
      <div class="actions">
        ${chosen.length >= 2 && chosen.length <= COMPARED && html`
          <a class="button" href=${`#/compare/${chosen.join(",")}`}>Compare ${chosen.length} runs</a>`}
        <a class="button primary" href="#/submit">New run</a>
      </div>
    </div>
    <div class="filters" role="search">
      <input
        type="search" aria-label="Find by name" placeholder="Find by name"
        value=${name} onInput=${(event) => choose("name")(event.target.value)}
      />
      <input
        type="search" aria-label="Figures" placeholder="perplexity<30" title="Such as perplexity<30 dollars<5 tokens>=1e9"
        value=${where} onChange=${(event) => choose("where")(event.target.value)}
      />
      <${Choices} label="State" options=${STATE_CHOICES} value=${state} choose=${choose("state")} />
      ${(projects.length > 1 || project !== "") && html`
        <select aria-label="Project" value=${project} onChange=${(event) => choose("project")(event.target.value)}>
          <option value="">all projects</option>
          ${projects.map((each) => html`<option key=${each.id} value=${each.id}>${projectName(each)}</option>`)}
        </select>`}
      <select aria-label="Order" value=${order} onChange=${(event) => choose("order_by")(event.target.value)}>
        ${ORDERS.map(([value, words]) => html`<option key=${value} value=${value}>${words}</option>`)}
      </select>
    </div>
    <${Notice} problem=${problem} />
    <section class="sheet" aria-label="List of runs" aria-busy=${list === null}>
      ${list === null && html`<p class="empty">Loading…</p>`}
      ${list?.runs.length === 0 && (filtered ? html`<p class="empty">No run matches.</p>` : html`<${NoRuns} />`)}
      ${list?.runs.length > 0 && html`<${RunTable} runs=${list.runs} now=${now} chosen=${chosen} toggle=${toggle} />`}
      ${list?.more && html`<div class="more"><button onClick=${() => setWanted(wanted + PAGE)}>More runs</button></div>`}
    </section>`;
}

const NoRuns = () => html`
  <div class="empty">
    <h2>No runs yet</h2>
    <p>
      A run clusters a corpus, trains one small dense model per cluster on cheap GPUs, and merges them into one
      Mixture-of-Experts.
    </p>
    <p><a href="#/submit">Start one from a preset</a></p>
  </div>`;

/** With explicit roles it stays a table for screen readers when a narrow screen shows it as a list. */
function RunTable({ runs, now, chosen, toggle }) {
  const known = runs.map((run) => run.results.perplexity).filter((perplexity) => perplexity !== null);
  const best = known.length > 1 ? Math.min(...known) : null;
  return html`
    <table class="rows runs" role="table">
      <thead role="rowgroup">
        <tr role="row">
          ${["Run", "State", "Stage"].map((title) => html`<th role="columnheader" scope="col">${title}</th>`)}
          <th role="columnheader" scope="col" class="number">Perplexity</th>
          <th role="columnheader" scope="col" class="number">Spent / planned</th>
          <th role="columnheader" scope="col" class="number">Age</th>
        </tr>
      </thead>
      <tbody role="rowgroup">${runs.map((run) => html`
        <${RunRow} key=${run.id} run=${run} now=${now} best=${best} isChosen=${chosen.includes(run.id)} toggle=${() => toggle(run.id)} />`)}
      </tbody>
    </table>`;
}

function RunRow({ run, now, best, isChosen, toggle }) {
  const { money, results } = run;
  const overspent = money.budget_dollars !== null && money.dollars >= money.budget_dollars;
  return html`
    <tr role="row">
      <td role="cell" class="name">
        <span class="chosen">
          <input type="checkbox" aria-label=${`Compare ${run.name}`} checked=${isChosen} onChange=${toggle} />
          <a href=${`#/runs/${run.id}`}>${run.name}</a>
        </span>
        <span class="sub">${subline(run)}</span>
      </td>
      <td role="cell"><${StatePill} state=${run.state} /></td>
      <td role="cell" class="stage">
        <${StageStrip} stages=${run.stages} /><span class="sub">${stageWords(run)}</span>
      </td>
      <td role="cell" class="number" data-label="perplexity">
        ${decimal(results.perplexity, 2)}${results.perplexity !== null && results.perplexity === best && html`<strong> best</strong>`}
        ${results.bits_per_byte !== null && html`<span class="sub">${decimal(results.bits_per_byte, 3)} bits per byte</span>`}
      </td>
      <td role="cell" class="number cost">
        <span>${dollars(money.dollars)} <span class="soft">of ${dollars(money.estimate_dollars)}</span></span>
        <${Meter} share=${money.dollars / (money.estimate_dollars || 1)} over=${overspent} />
      </td>
      <td role="cell" class="number" title=${moment(run.created)}>${age(now - run.created)}</td>
    </tr>`;
}

/** The nine stages of the pipeline as marks. */
const StageStrip = ({ stages }) => html`
  <span class="strip" aria-hidden="true">${stages.map((stage) => html`<i class=${stage.status} key=${stage.name}></i>`)}</span>`;

/** @returns {string} Line under a run's name: owner, project, tags, priority, note and reason. */
function subline(run) {
  const tags = Object.entries(run.tags).map(([key, value]) => `${key}: ${value}`);
  const parts = [run.owner, projectOf(run), ...tags].filter(Boolean);
  if (run.priority !== 0) parts.push(`priority ${run.priority}`);
  if (run.note) parts.push(run.note.split("\n")[0]);
  if (run.reason) parts.push(run.reason);
  return parts.join(" · ");
}

/** @returns {string} Current stage, or place in the queue. */
function stageWords(run) {
  if (run.position !== null) return `queued (#${run.position})`;
  const done = run.stages.filter((stage) => stage.status === "done" || stage.status === "reused").length;
  const current = run.stages.find((stage) => stage.status === "running" || stage.status === "failed");
  if (current) return `${current.name}, ${done + 1} of ${run.stages.length}`;
  return run.stages.length ? `${done} of ${plural(run.stages.length, "stage")}` : "";
}

/** The first runs that match, and whether there are more. */
async function found(count, filter, signal) {
  const runs = [];
  let cursor;
  do {
    const page = await ask("/v1/runs" + query({ ...filter, limit: Math.min(MOST, count - runs.length), cursor }), { signal });
    runs.push(...page.items);
    cursor = page.next_cursor;
  } while (cursor && runs.length < count);
  return { runs, more: Boolean(cursor) };
}
