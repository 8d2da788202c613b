/** Cost of a run compared with its plan, its budget and the cheapest other way. All numbers come from the service. */

import { ask } from "../api.js";
import { html, useRef, useState } from "../lib.js";
import { Question } from "../parts/question.js";
import { Meter, Notice, Sheet } from "../parts/small.js";
import { dollars, duration } from "../words.js";

/** @param {{run: any, changed: () => void}} props */
export function Money({ run, changed }) {
  const [asking, setAsking] = useState(false);
  const { bill, estimate } = run;
  const { budget_dollars: budget } = run.money;
  const baseline = bill.baseline ?? estimate.baseline;
  const bars = [
    ["Spent", bill.dollars, "var(--accent)", "all stages, including start-ups and lost work"],
    ...(bill.idle_dollars ? [["With idle machines", bill.dollars_with_idle, "var(--edge)", "if rented only for this run"]] : []),
    ["Planned", estimate.dollars, "var(--edge)", estimate.dollars === null ? "the speed of the nodes is unknown" : ""],
    ...(budget === null ? [] : [["Budget", budget, "var(--warn)", ""]]),
    ...(baseline ? [["Cheapest other way", baseline.dollars, "var(--edge)", `${baseline.name}, an estimate`]] : []),
  ];
  const most = Math.max(...bars.map(([, amount]) => amount ?? 0)) || 1;
  const overspent = budget !== null && bill.dollars >= budget;
  const tools = run.state !== "succeeded" && html`
    <button class="plain" onClick=${() => setAsking(true)}>${budget === null ? "Set a budget" : "Change the budget"}</button>`;
  const answered = () => {
    setAsking(false);
    changed();
  };
  return html`
    <${Sheet} title="Cost" note=${duration(bill.seconds)} span="half" tools=${tools}>
      <${Verdict} bill=${bill} />
      <dl class="bars">
        ${bars.map(([name, amount, tone, note]) => html`
          <div key=${name}>
            <dt>${name}</dt>
            <dd class="number">${dollars(amount)}</dd>
            <dd class="bar-cell"><${Meter} share=${(amount ?? 0) / most} tone=${tone} over=${name === "Spent" && overspent} /></dd>
            <dd class="soft note">${note}</dd>
          </div>`)}
      </dl>
      <p class="soft small held">${heldWords(run.money.worker_seconds)}</p>
      ${asking && html`<${BudgetQuestion} run=${run} answered=${answered} />`}
    </${Sheet}>`;
}

function BudgetQuestion({ run, answered }) {
  const [budget, setBudget] = useState(String(run.money.budget_dollars ?? ""));
  const [problem, setProblem] = useState(null);
  const field = useRef(null);
  const answer = async (yes) => {
    // The value of a number that cannot be read is "", like that of an empty field
    if (yes && !field.current.reportValidity()) return;
    try {
      const given = budget.trim() === "" ? null : Number(budget);
      if (yes) await ask(`/v1/runs/${run.id}`, { method: "PATCH", body: { budget_dollars: given } });
      answered();
    } catch (error) {
      setProblem(error);
    }
  };
  return html`
    <${Question} title=${`Budget of ${run.name}`} yes="Save" answer=${answer}>
      <${Notice} problem=${problem} />
      <p>The run stops with a checkpoint when its cost reaches the budget; an empty field removes it. Cost so far: ${dollars(run.bill.dollars)}.</p>
      <div class="field asked">
        <label for="new-budget">Budget, dollars</label>
        <input
          ref=${field} id="new-budget" type="number" min="0.0001" step="any"
          value=${budget} onInput=${(event) => setBudget(event.target.value)}
        />
      </div>
    </${Question}>`;
}

/** The service's verdict on saving and quality. @param {{bill: any}} props `bill`: a bill, or a plan. */
export const Verdict = ({ bill }) => bill.verdict && html`<p class="small verdict-words">${bill.verdict}</p>`;

function heldWords(seconds) {
  const held = Object.entries(seconds).filter(([, each]) => each > 0);
  if (!held.length) return "No worker time used yet.";
  return "Worker time: " + held.map(([pool, each]) => `${pool.replace("_", "-")} ${duration(each)}`).join(", ") + ".";
}
