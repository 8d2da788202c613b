/** Events of a run, newest first, one line each. */

import { html, useState } from "../lib.js";
import { Choices, Sheet } from "../parts/small.js";
import { clock, decimal, duration, moment, plural } from "../words.js";

const FILTERS = [["main", "main"], ["all", "all"]];
const SHOWN = 200;
const COMMON = ["progress", "stage_progress", "checkpoint", "slots_free"];
const BAD = ["run_failed", "worker_restarted", "warning"];

/** @param {{events: import("./fold.js").RunEvent[]}} props Oldest first. */
export function EventList({ events }) {
  const [all, setAll] = useState(false);
  if (!events.length) return null;
  const chosen = all ? events : events.filter((event) => !COMMON.includes(event.type));
  const tools = html`
    <${Choices} label="Events" options=${FILTERS} value=${all ? "all" : "main"} choose=${(choice) => setAll(choice === "all")} />`;
  return html`
    <${Sheet} title="Events" tools=${tools} span="half">
      <div class="events" tabindex="0" role="group" aria-label="Events, newest first">
        <ol>
          ${chosen.slice(-SHOWN).reverse().map((event) => html`
            <li key=${event.position} class=${BAD.includes(event.type) ? "bad" : ""}>
              <time datetime=${new Date(event.time * 1000).toISOString()} title=${moment(event.time)}>${clock(event.time)}</time>
              <span>${eventWords(event)}</span>
            </li>`)}
        </ol>
      </div>
    </${Sheet}>`;
}

/** @param {import("./fold.js").RunEvent} event @returns {string} */
function eventWords({ type, stage, unit, data }) {
  switch (type) {
    case "state": return `State: ${data.state}${data.reason ? `, ${data.reason}` : ""}`;
    case "run_started": return "The driver started";
    case "run_finished": return `The run finished after ${duration(data.seconds ?? 0)}`;
    case "run_failed": return `The run failed: ${data.message ?? ""}`;
    case "run_stopped": return `The run stopped${data.reason ? `: ${data.reason}` : ""}`;
    case "stage_started": return `Stage ${stage} started`;
    case "stage_skipped": return `Stage ${stage} reused`;
    case "stage_progress": return `${stage}: ${data.done}${data.total ? ` of ${data.total}` : ""} ${data.unit}`;
    case "stage_finished": return `Stage ${stage} finished after ${duration(data.seconds ?? 0)}`;
    case "unit_started": return `${unit} started on ${data.node ?? "a worker"}, ${plural(data.steps ?? 0, "step")}`;
    case "unit_finished": return `${unit} finished, loss ${decimal(data.loss, 3)}`;
    case "unit_let_go": return `${unit} stopped early, the merge uses its ${data.contribution}: ${data.reason ?? ""}`;
    case "progress": return `${unit} step ${data.step}, loss ${decimal(data.loss, 3)}`;
    case "checkpoint": return `${unit} saved at step ${data.step}`;
    case "evaluation": return `${unit} step ${data.step}, held-out loss ${decimal(data.held_out_loss, 3)}`;
    case "sync": return `Sync ${data.sync} of ${data.syncs}: ${plural((data.members ?? []).length, "model")} combined`;
    case "clusters": return `${plural((data.tokens ?? []).length, "cluster")} found`;
    case "worker_restarted": return `${unit} restarted: ${data.reason || "its worker died"}`;
    case "workers_held": return `${plural(data.workers ?? 0, "worker")} of the ${(data.pool ?? "").replace("_", "-")} pool in use`;
    case "ray_starting": return "Ray starts";
    case "workers_released": return "Workers released";
    case "slots_free": return `${plural(data.slots ?? 0, "slot")} of the ${(data.pool ?? "").replace("_", "-")} pool free`;
    case "nodes_asked": return `Nodes for ${plural(data.workers ?? 0, "worker")} of the ${(data.pool ?? "").replace("_", "-")} pool requested`;
    case "nodes_let_go": return `Nodes of the ${(data.pool ?? "").replace("_", "-")} pool no longer requested`;
    case "warning": return `Warning: ${data.message ?? ""}`;
    default: return type;
  }
}
