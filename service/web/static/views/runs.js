/** All runs, in the order and with the filters of the address, so that a link shows the same list. */

import { ask, query } from "../api.js";
import { html, useState } from "../lib.js";
import { ChosenRuns } from "../list/chosen.js";
import { asked, Filters, isFiltered } from "../list/filters.js";
import { projectOf, useProjects } from "../parts/projects.js";
import { Meter, Notice, StatePill } from "../parts/small.js";
import { useNow, usePolled } from "../polling.js";
import { routeOf } from "../router.js";
import { age, decimal, dollars, moment, plural } from "../words.js";

const REFRESH_SECONDS = 3;
const PAGE = 50;
/** Maximum number of runs in one response. */
const MOST = 200;
/** Columns with the field by which each sorts, and the direction of the first click. */
const COLUMNS = [["Run", "name", ""], ["State", "state", ""], ["Stage", null], ["Perplexity", "perplexity", ""], ["Spent / planned", "dollars", "-"],
  ["Age", "created", "-"]];
const NEWEST = "-created";

/** @param {{filter: import("../list/filters.js").Filter}} props `filter`: filters and order of the address. */
export function RunsView({ filter }) {
  const projects = useProjects();
  const [wanted, setWanted] = useState(PAGE);
  const [chosen, setChosen] = useState([]);
  const [version, setVersion] = useState(0);
  const fields = asked(filter);
  const { value: list, problem } = usePolled(
    (signal) => found(wanted, fields, signal), REFRESH_SECONDS, [JSON.stringify(fields), wanted, version]);
  const now = useNow(5);
  const choose = (field) => (value) => {
    setWanted(PAGE);
    // Not `filter`: another field may have changed the address since this view was drawn
    const fields = Object.entries({ ...routeOf(location.hash).filter, [field]: value }).filter(([, each]) => each !== "");
    // The list stays in place, so no entry of the history per letter
    history.replaceState(null, "", fields.length ? `#/runs?${new URLSearchParams(fields)}` : "#/runs");
    dispatchEvent(new HashChangeEvent("hashchange"));
  };
  const toggle = (id) => setChosen(chosen.includes(id) ? chosen.filter((each) => each !== id) : [...chosen, id]);
  const done = (left) => {
    setChosen(left);
    setVersion(version + 1);
  };
  const runs = list?.runs ?? [];
  const byId = new Map(runs.map((run) => [run.id, run]));
  return html`
    <div class="heading">
      <div class="lead"><h1>Runs</h1></div>
      <div class="actions"><a class="button primary" href="#/submit">New run</a></div>
    </div>
    <${Filters} filter=${filter} projects=${projects} choose=${choose} />
    <${Notice} problem=${problem} />
    <${ChosenRuns} runs=${chosen.map((id) => byId.get(id)).filter(Boolean)} done=${done} />
    <section class="sheet" aria-label="List of runs" aria-busy=${list === null}>
      ${list === null && html`<p class="empty">Loading…</p>`}
      ${list?.runs.length === 0 && (isFiltered(filter) ? html`<p class="empty">No run matches.</p>` : html`<${NoRuns} />`)}
      ${runs.length > 0 && html`
        <${RunTable} runs=${runs} now=${now} chosen=${chosen} toggle=${toggle} order=${filter.order_by || NEWEST}
          sort=${(order) => choose("order_by")(order === NEWEST ? "" : order)} />`}
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
function RunTable({ runs, now, chosen, toggle, order, sort }) {
  const known = runs.map((run) => run.results.perplexity).filter((perplexity) => perplexity !== null);
  const best = known.length > 1 ? Math.min(...known) : null;
  return html`
    <table class="rows runs" role="table">
      <thead role="rowgroup">
        <tr role="row">
          ${COLUMNS.map(([title, field, first], place) => html`
            <${Head} key=${title} title=${title} field=${field} first=${first} number=${place > 2} order=${order} sort=${sort} />`)}
        </tr>
      </thead>
      <tbody role="rowgroup">${runs.map((run) => html`
        <${RunRow} key=${run.id} run=${run} now=${now} best=${best} isChosen=${chosen.includes(run.id)} toggle=${() => toggle(run.id)} />`)}
      </tbody>
    </table>`;
}

/** Head of a column, which sorts by it; again, in the other direction. */
function Head({ title, field, first, number, order, sort }) {
  const [up, down] = [field, `-${field}`];
  const sorted = order === up ? "ascending" : order === down ? "descending" : null;
  const next = order === up ? down : order === down ? up : first + field;
  return html`
    <th role="columnheader" scope="col" class=${number ? "number" : ""} aria-sort=${sorted}>
      ${field === null ? title : html`
        <button type="button" class="sorter" onClick=${() => sort(next)}>
          ${title}<span aria-hidden="true">${{ ascending: " ↑", descending: " ↓" }[sorted] ?? ""}</span></button>`}
    </th>`;
}

function RunRow({ run, now, best, isChosen, toggle }) {
  const { money, results } = run;
  const overspent = money.budget_dollars !== null && money.dollars >= money.budget_dollars;
  return html`
    <tr role="row">
      <td role="cell" class="name">
        <span class="chosen">
          <input type="checkbox" aria-label=${`Choose ${run.name}`} checked=${isChosen} onChange=${toggle} />
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
