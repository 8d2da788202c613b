/** Table of the trainings of a run: the seed, each sub-model, and the fine-tune. */

import { html } from "../lib.js";
import { Meter, Sheet } from "../parts/small.js";
import { count, decimal, duration, percent, plural, whole } from "../words.js";
import { secondsLeft } from "./fold.js";
import { byUnit, unitTone } from "./palette.js";

const COLUMNS = [
  ["Training", ""], ["Status", ""], ["Progress", ""], ["Step", "number"], ["Loss", "number"], ["Tokens/s", "number"],
  ["Left", "number"], ["Attempts", "number"], ["Workers", ""],
];

/** @param {{units: Map<string, import("./fold.js").Unit>, active: boolean}} props `active`: whether the run has a driver. */
export function UnitTable({ units, active }) {
  const rows = [...units.values()].sort((a, b) => byUnit(a.unit, b.unit));
  if (!rows.length) return null;
  const training = active ? rows.filter((unit) => unit.status !== "done").length : 0;
  return html`
    <${Sheet} title="Trainings" note=${training ? `${training} of ${rows.length} training` : plural(rows.length, "training")}>
      <table class="rows units" role="table">
        <thead role="rowgroup">
          <tr role="row">
            ${COLUMNS.map(([title, style]) => html`<th role="columnheader" scope="col" class=${style}>${title}</th>`)}
          </tr>
        </thead>
        <tbody role="rowgroup">${rows.map((unit) => html`<${UnitRow} key=${unit.unit} unit=${unit} active=${active} />`)}</tbody>
      </table>
    </${Sheet}>`;
}

function UnitRow({ unit, active }) {
  const left = active ? secondsLeft(unit) : null;
  const status = unit.status !== "done" && !active ? "stopped" : unit.status;
  const speed = active && unit.status === "running" && unit.tokens_per_second;
  const tone = { "--tone": `var(${unitTone(unit.unit)})` };
  return html`
    <tr role="row">
      <th role="rowheader" scope="row" class="name"><span class="named"><i class="swatch" style=${tone}></i>${unit.unit}</span></th>
      <td role="cell" class=${`status ${status}`}>${status}</td>
      <td role="cell" class="full progress"><${Meter} share=${unit.step / (unit.steps || 1)} tone=${tone["--tone"]} /></td>
      <td role="cell" class="number" data-label="step">${whole(unit.step)}<span class="soft"> / ${whole(unit.steps)}</span></td>
      <td role="cell" class="number" data-label="loss">${decimal(unit.loss, 3)}</td>
      <td role="cell" class="number" data-label="tokens/s">${speed ? count(unit.tokens_per_second) : "–"}
        ${speed && unit.mfu != null && html`<span class="soft"> ${percent(unit.mfu)} MFU</span>`}</td>
      <td role="cell" class="number" data-label="left">${left === null ? "–" : duration(left)}</td>
      <td role="cell" class="number" data-label="attempts">${unit.restarts + 1}</td>
      <td role="cell" class="soft" data-label="on">${unit.node ? `${unit.workers} on ${unit.node}` : "–"}</td>
    </tr>`;
}
