/** Filters and order of the list of runs, as they stand in the address. */

import { html, useEffect, useState } from "../lib.js";
import { projectName } from "../parts/projects.js";
import { Choices } from "../parts/small.js";

const STATES = ["queued", "starting", "running", "stopping", "succeeded", "failed", "cancelled"];
const STATE_CHOICES = [["", "all"], ...STATES.map((state) => [state, state])];
const ORDERS = [["", "newest first"], ["created", "oldest first"], ["perplexity", "lowest perplexity"], ["-perplexity", "highest perplexity"],
  ["dollars", "cheapest"], ["-dollars", "most expensive"], ["-tokens", "most tokens"], ["name", "name"], ["-name", "name, backwards"],
  ["state", "state"], ["-state", "state, backwards"]];
/** Filters that are folded away until one of them is set. */
const SELDOM = ["owner", "tag", "from", "until"];

/** @typedef {Record<string, string>} Filter
 *   `name`, `state`, `project`, `where`, `owner`, `tag`, `from`, `until` (days such as `2026-11-30`) and `order_by`. */

/** Fields of the query that the filters ask for. @param {Filter} filter */
export const asked = ({ state, project, name = "", where = "", owner = "", tag = "", from, until, order_by }) => ({
  state,
  project,
  owner: owner.trim(),
  name: name.trim(),
  tag: words(tag),
  where: words(where),
  created_after: from && seconds(from),
  created_before: until && seconds(until, 1),
  order_by,
});

/** Whether a filter is set. @param {Filter} filter */
export const isFiltered = ({ order_by, ...filters }) => Object.values(filters).some((value) => value.trim() !== "");

const words = (text) => text.split(/[\s,;]+/).filter(Boolean);

/** Beginning of a day in the reader's time zone (seconds since the epoch). */
function seconds(day, later = 0) {
  const [year, month, date] = day.split("-").map(Number);
  return new Date(year, month - 1, date + later).getTime() / 1000 || null;
}

/** @param {{filter: Filter, projects: any[], choose: (field: string) => (value: string) => void}} props */
export function Filters({ filter, projects, choose }) {
  const { name = "", state = "", project = "", order_by: order = "" } = filter;
  const field = (key, label, rest) => html`<${Field} label=${label} value=${filter[key] ?? ""} choose=${choose(key)} ...${rest} />`;
  return html`
    <div class="filters" role="search">
      <input
        type="search" aria-label="Find by name" placeholder="Find by name"
        value=${name} onInput=${(event) => choose("name")(event.target.value)}
      />
      ${field("where", "Figures", { type: "search", placeholder: "perplexity<30", title: "Such as perplexity<30 dollars<5 tokens>=1e9" })}
      <${Choices} label="State" options=${STATE_CHOICES} value=${state} choose=${choose("state")} />
      ${(projects.length > 1 || project !== "") && html`
        <select aria-label="Project" value=${project} onChange=${(event) => choose("project")(event.target.value)}>
          <option value="">all projects</option>
          ${projects.map((each) => html`<option key=${each.id} value=${each.id}>${projectName(each)}</option>`)}
        </select>`}
      <select aria-label="Order" value=${order} onChange=${(event) => choose("order_by")(event.target.value)}>
        ${ORDERS.map(([value, words]) => html`<option key=${value} value=${value}>${words}</option>`)}
      </select>
      <details open=${SELDOM.some((key) => filter[key])}>
        <summary>More filters</summary>
        <div class="filters">
          ${field("owner", "Owner", { type: "search", placeholder: "owner" })}
          ${field("tag", "Tag", { type: "search", placeholder: "team:vision" })}
          <label>from ${field("from", "Submitted from", { type: "date" })}</label>
          <label>until ${field("until", "Submitted until", { type: "date" })}</label>
        </div>
      </details>
    </div>`;
}

/** A field whose text counts when it is left, or with Enter. What is being typed stays while the list loads anew. */
function Field({ label, value, choose, ...rest }) {
  const [draft, setDraft] = useState(value);
  useEffect(() => setDraft(value), [value]);
  return html`
    <input aria-label=${label} value=${draft} onInput=${(event) => setDraft(event.target.value)}
      onChange=${(event) => choose(event.target.value)} ...${rest} />`;
}
