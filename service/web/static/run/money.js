/** Cost of a run so far and to come, next to its plan and budget. All numbers come from the service. */

import { ask } from "../api.js";
import { html, useRef, useState } from "../lib.js";
import { mayEdit } from "../parts/projects.js";
import { Question } from "../parts/question.js";
import { Notice, Sheet } from "../parts/small.js";
import { dollars, duration } from "../words.js";

/** @param {{run: any, changed: () => void}} props */
export function Money({ run, changed }) {
  const [asking, setAsking] = useState(false);
  const { bill, forecast } = run;
  const planned = run.money.estimate_dollars;
  const { budget_dollars: budget } = run.money;
  const expected = forecast?.dollars ?? null;
  const scale = Math.max(bill.dollars, expected ?? 0, budget ?? 0, planned ?? 0);
  const tools = mayEdit(run) && run.state !== "succeeded" && html`
    <button class="plain" onClick=${() => setAsking(true)}>${budget === null ? "Set a budget" : "Change the budget"}</button>`;
  const answered = () => {
    setAsking(false);
    changed();
  };
  return html`
    <${Sheet} title="Cost" note=${duration(bill.seconds)} span="half" tools=${tools}>
      <${SpendingBar} spent=${bill.dollars} expected=${expected} budget=${budget} scale=${scale} />
      <dl class="figures">
        <div><dt><i class="swatch" style=${{ "--tone": "var(--accent)" }}></i>Spent</dt><dd>${dollars(bill.dollars)}</dd></div>
        ${expected !== null && html`
          <div><dt><i class="swatch to-come"></i>To come</dt><dd>about ${dollars(Math.max(0, expected - bill.dollars))}</dd></div>`}
        <div><dt>Planned</dt><dd>${planned === null ? "unknown" : dollars(planned)}</dd></div>
        ${budget !== null && html`<div><dt><i class="swatch limit"></i>Budget</dt><dd>${dollars(budget)}</dd></div>`}
      </dl>
      ${budget !== null && expected > budget && html`<p class="notice warn">At this pace the run reaches its budget before its end.</p>`}
      <p class="soft small held">${heldWords(run)}</p>
      ${asking && html`<${BudgetQuestion} run=${run} answered=${answered} />`}
    </${Sheet}>`;
}

/** What is spent, what is to come, and the budget, on one scale. Hidden from screen readers, since the figures are below it. */
function SpendingBar({ spent, expected, budget, scale }) {
  const share = (amount) => (scale > 0 ? Math.min(1, amount / scale) : 0);
  const over = budget !== null && spent >= budget;
  return html`
    <div class=${over ? "spending over" : "spending"} aria-hidden="true">
      ${expected !== null && html`<i class="to-come" style=${{ "--share": share(expected) }}></i>`}
      <i class="spent" style=${{ "--share": share(spent) }}></i>
      ${budget !== null && html`<i class="limit" style=${{ "--share": share(budget) }}></i>`}
    </div>`;
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

/** How long workers were held, and the cost with idle machines. */
function heldWords({ bill, money }) {
  const held = Object.entries(money.worker_seconds).filter(([, each]) => each > 0);
  if (!held.length) return "No worker time used yet.";
  const idle = bill.idle_dollars ? ` With idle machines, if they are rented only for this run: ${dollars(bill.dollars_with_idle)}.` : "";
  return `Worker time: ${held.map(([pool, each]) => `${pool.replace("_", "-")} ${duration(each)}`).join(", ")}.${idle}`;
}
