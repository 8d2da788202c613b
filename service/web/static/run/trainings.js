/** Trainings as Ray Train reports them: state, attempts, and the workers of the last attempt. */

import { ask } from "../api.js";
import { html } from "../lib.js";
import { Scroll, Sheet } from "../parts/small.js";
import { usePolled } from "../polling.js";
import { duration, plural } from "../words.js";

const ACTIVE_SECONDS = 5;
const ENDED_SECONDS = 60;
const COLUMNS = ["Training", "State", "Attempts", "Workers", "Nodes", "Time"];

/** @param {{id: string, attempt: number, active: boolean}} props `active`: whether the run has a driver. */
export function Trainings({ id, attempt, active }) {
  const load = (signal) => (attempt ? ask(`/v1/runs/${id}/trainings`, { signal }) : { items: [] });
  const { value } = usePolled(load, active ? ACTIVE_SECONDS : ENDED_SECONDS, [id, attempt, active]);
  const trainings = value?.items ?? [];
  if (!trainings.length) return null;
  const running = trainings.filter((training) => training.state === "RUNNING").length;
  return html`
    <${Sheet} title="Ray Train" note=${running ? `${running} of ${trainings.length} running` : plural(trainings.length, "training")}>
      <${Scroll} label="Trainings">
        <table>
          <thead><tr>${COLUMNS.map((title) => html`<th scope="col">${title}</th>`)}</tr></thead>
          <tbody>${trainings.map((training) => html`<${Row} key=${`${training.unit} ${training.started}`} training=${training} />`)}</tbody>
        </table>
      </${Scroll}>
    </${Sheet}>`;
}

function Row({ training }) {
  const { attempts } = training;
  const workers = attempts.at(-1)?.workers ?? [];
  const alive = workers.filter((worker) => worker.state === "ALIVE").length;
  const nodes = [...new Set(workers.map((worker) => worker.node))].sort();
  const ended = attempts.filter((each) => each.state === "ERRORED" || each.state === "ABORTED").length;
  return html`
    <tr>
      <th scope="row">${training.unit}${training.run_attempt > 1 && html`<span class="soft"> (attempt ${training.run_attempt})</span>`}</th>
      <td>${training.state.toLowerCase()}${training.detail && html`<span class="soft"> ${training.detail}</span>`}</td>
      <td>${attempts.length}${ended > 0 && html`<span class="soft">, ${ended} failed</span>`}</td>
      <td>${training.ended === null ? `${alive} of ${workers.length} alive` : workers.length}</td>
      <td class="soft">${nodes.join(", ") || "–"}</td>
      <td>${training.ended === null ? "–" : duration(Math.max(0, training.ended - training.started))}</td>
    </tr>`;
}
