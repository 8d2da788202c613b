/** What a run has cost, against what was planned, allowed, and spared. */

import { ask } from "../api.js";
import { html, useState } from "../lib.js";
import { Question } from "../parts/question.js";
import { Meter, Notice, Sheet } from "../parts/small.js";
import { dollars, duration, percent } from "../words.js";

/** @param {{run: any, saved: number | null, changed: () => void}} props `saved`: measured share, once the run has a report. */
export function Money({ run, saved, changed }) {
  const [asking, setAsking] = useState(false);
  const { dollars: spent, estimate_dollars: estimate, full_training_dollars: full, budget_dollars: budget } = run.money;
  const most = Math.max(spent, estimate, full, budget ?? 0) || 1;
  const overspent = budget !== null && spent >= budget;
  const bars = [
    ["Spent", spent, "var(--accent)", ""],
    ["Estimate", estimate, "var(--edge)", estimate ? `${percent(spent / estimate)} of it spent` : ""],
    ...(budget === null ? [] : [["Budget", budget, "var(--warn)", `${percent(spent / budget)} of it spent`]]),
    ["Full training", full, "var(--edge)", "the whole model on as many tokens, estimated"],
  ];
  const tools = run.state !== "succeeded" && html`
    <button class="plain" onClick=${() => setAsking(true)}>${budget === null ? "Set a budget" : "Change the budget"}</button>`;
  const answered = () => {
    setAsking(false);
    changed();
  };
  return html`
    <${Sheet} title="Cost" note=${saved === null ? "" : savedWords(saved)} span="half" tools=${tools}>
      <dl class="bars">
        ${bars.map(([name, amount, tone, note]) => html`
          <div key=${name}>
            <dt>${name}</dt>
            <dd class="number">${dollars(amount)}</dd>
            <dd class="bar-cell"><${Meter} share=${amount / most} tone=${tone} over=${name === "Spent" && overspent} /></dd>
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
  const answer = async (yes) => {
    try {
      if (yes) await ask(`/v1/runs/${run.id}`, { method: "PATCH", body: { budget_dollars: Number(budget) } });
      answered();
    } catch (error) {
      setProblem(error);
    }
  };
  return html`
    <${Question} title=${`Budget of ${run.name}`} yes="Save" answer=${answer}>
      <${Notice} problem=${problem} />
      <p>The run is stopped, with a checkpoint, once it has cost this. So far it has cost ${dollars(run.money.dollars)}.</p>
      <div class="field asked">
        <label for="new-budget">Budget, dollars</label>
        <input
          id="new-budget" type="number" min="0.0001" step="any"
          value=${budget} onInput=${(event) => setBudget(event.target.value)}
        />
      </div>
    </${Question}>`;
}

/** @param {number} saved Share of the cost of full training. @returns {string} */
export const savedWords = (saved) => `${percent(Math.abs(saved))} ${saved >= 0 ? "cheaper" : "dearer"} than full training`;

function heldWords(seconds) {
  const held = Object.entries(seconds).filter(([, each]) => each > 0);
  if (!held.length) return "No worker has been held yet.";
  return "Workers held: " + held.map(([pool, each]) => `${pool.replace("_", "-")} ${duration(each)}`).join(", ") + ".";
}
