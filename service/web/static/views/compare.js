/** Runs next to each other: what differs in settings, stages, cost, held-out figures, curves and samples. */

import { ask, query } from "../api.js";
import { html, useEffect, useMemo, useState } from "../lib.js";
import { LineChart } from "../parts/line_chart.js";
import { Choices, Notice, Scroll, Sheet, StatePill } from "../parts/small.js";
import { alongRun, pointsFor, smooth } from "../run/curves.js";
import { clusterTone, unitDash } from "../run/palette.js";
import { count, decimal, dollars, duration } from "../words.js";

const FIGURES = [["held_out_loss", "held-out loss"], ["loss", "loss"]];
const plain = (value) => decimal(value, 2);

/** @param {{ids: string[]}} props Ids of the runs, in the order of the columns. */
export function CompareView({ ids }) {
  const [found, setFound] = useState(null);
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    const ending = new AbortController();
    ask("/v1/comparison" + query({ run: ids }), { signal: ending.signal }).then((answer) => setFound({ ...answer, runs: labelled(answer.runs) }), (error) => {
      if (error.name !== "AbortError") setProblem(error);
    });
    return () => ending.abort();
  }, [ids.join()]);
  if (!found) {
    return problem
      ? html`<div class="empty"><h1>Nothing to compare</h1><${Notice} problem=${problem} /><p><a href="#/runs">All runs</a></p></div>`
      : html`<p class="empty">Loading…</p>`;
  }
  const { runs } = found;
  return html`
    <div class="heading"><div class="lead"><h1>Comparison of ${runs.length} runs</h1></div></div>
    ${!found.same_text && html`
      <p class="notice warn">The held-out figures are of different text: they cannot be compared.</p>`}
    <div class="grid run">
      <${Columns} title="Runs" runs=${runs} rows=${factsOf(runs)} linked />
      <${Columns} title="Settings that differ" runs=${runs} empty="All settings are equal."
        rows=${found.settings.map(({ setting, values }) => [setting, values.map(settingWords)])} />
      <${Overlay} runs=${runs} stages=${found.stages} />
      <${Columns} title="Held-out perplexity" runs=${runs} numbers
        rows=${found.sources.map(({ source, perplexity }) => [source, best(perplexity, (value) => decimal(value, 2), found.same_text)])}
        empty="No run has measured it." />
      <${Columns} title="Stages" runs=${runs} numbers
        rows=${found.stages.map((stage) => [stage.stage, stage.seconds.map((seconds, at) => stageWords(seconds, stage.dollars[at]))])}
        empty="No stage has finished." />
      <${SampleSheet} runs=${runs} samples=${found.samples} />
    </div>`;
}

/** Runs with names that differ: a retry has the name of the earlier run. */
function labelled(runs) {
  const shared = (name) => runs.filter((run) => run.name === name).length > 1;
  return runs.map((run) => ({ ...run, label: shared(run.name) ? `${run.name} ${run.id.slice(-4)}` : run.name }));
}

const stageWords = (seconds, cost) => (seconds === null ? "–" : `${duration(seconds)}, ${dollars(cost)}`);
const settingWords = (value) => (value === null ? "–" : typeof value === "string" ? value : JSON.stringify(value));

function factsOf(runs) {
  const row = (title, words) => [title, runs.map(words)];
  return [
    row("State", (run) => html`<${StatePill} state=${run.state} />`),
    row("Owner", (run) => run.owner),
    row("Tags", (run) => Object.entries(run.tags).map(([key, value]) => `${key}: ${value}`).join(", ") || "–"),
    row("Cost", (run) => dollars(run.dollars)),
    row("Time", (run) => (run.seconds === null ? "–" : duration(run.seconds))),
    row("Tokens", (run) => count(run.tokens)),
    row("Held-out loss", (run) => decimal(run.loss, 4)),
    row("Bits per byte", (run) => decimal(run.bits_per_byte, 3)),
  ];
}

/** Numbers as words, the lowest marked, unless they cannot be compared. */
function best(values, words, comparable) {
  const known = values.filter((value) => value !== null);
  const lowest = comparable && known.length > 1 ? Math.min(...known) : null;
  const marked = (value) => html`<strong>${words(value)}<span class="soft"> best</span></strong>`;
  return values.map((value) => (value !== null && value === lowest ? marked(value) : words(value)));
}

/** A table with one column per run. */
function Columns({ title, runs, rows, numbers = false, linked = false, empty = "" }) {
  const style = numbers ? "number" : "";
  return html`
    <${Sheet} title=${title}>
      ${rows.length === 0 ? html`<p class="soft">${empty}</p>` : html`
        <${Scroll} label=${title}>
          <table>
            <thead><tr>
              <td></td>
              ${runs.map((run) => html`
                <th scope="col" class=${style} key=${run.id}>
                  ${linked ? html`<a href=${`#/runs/${run.id}`}>${run.label}</a>` : run.label}
                </th>`)}
            </tr></thead>
            <tbody>${rows.map(([name, cells]) => html`
              <tr key=${name}>
                <th scope="row">${name}</th>
                ${cells.map((cell, at) => html`<td class=${`${style} compared`} key=${runs[at].id}>${cell}</td>`)}
              </tr>`)}</tbody>
          </table>
        </${Scroll}>`}
    </${Sheet}>`;
}

/** One figure of all runs: one colour per run, one line per training. */
function Overlay({ runs, stages }) {
  const [chosen, choose] = useState(null);
  const [shown, setShown] = useState({ figure: "loss", curves: [] });
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    const ending = new AbortController();
    const load = chosen === null ? measured(runs, stages, ending.signal) : figureOf(runs, stages, chosen, ending.signal);
    load.then(setShown, (error) => {
      if (error.name !== "AbortError") setProblem(error);
    });
    return () => ending.abort();
  }, [runs, chosen]);
  const { figure, curves } = shown;
  const lines = useMemo(() => curves.flatMap((each, at) => each.map((curve) => lineOf(curve, at, figure))), [shown]);
  const words = FIGURES.find(([key]) => key === figure)[1];
  const tools = html`<${Choices} label="Figure" options=${FIGURES} value=${chosen ?? figure} choose=${choose} />`;
  return html`
    <${Sheet} title="Training" note="over each run's tokens" tools=${tools}>
      <${Notice} problem=${problem} />
      ${lines.length === 0 ? html`<p class="soft">No run has such a curve.</p>` : html`
        <${LineChart} label=${`Curves of ${words} over each run's tokens, one colour per run`} lines=${lines} format=${plain}
          logarithmic=${false} point=${ignore} />
        <ul class="legend">${runs.map((run, at) => html`
          <li class="small" key=${run.id}><span class="named"><i class="swatch" style=${{ "--tone": `var(${clusterTone(at)})` }}></i>${run.label}</span></li>`)}</ul>`}
    </${Sheet}>`;
}

const ignore = () => {};

/** The held-out loss, or the loss if no run has measured it during training. */
async function measured(runs, stages, signal) {
  const found = await figureOf(runs, stages, "held_out_loss", signal);
  return found.curves.some((each) => each.length) ? found : figureOf(runs, stages, "loss", signal);
}

/** The curves of each run, along its tokens; a stage that a run took from another counts with its tokens there. */
async function figureOf(runs, stages, figure, signal) {
  const curves = await Promise.all(runs.map(async ({ id }, at) => {
    const reused = new Map(stages.map(({ stage, tokens }) => [stage, tokens[at] ?? 0]));
    const of = (part) => ask(`/v1/runs/${id}${part}`, { signal });
    const [run, { items }] = await Promise.all([of(""), of("/submodels")]);
    const { series } = await of("/metrics" + query({ figure, points: pointsFor(runs.length * items.length) }));
    return alongRun(series, { stages: run.stages, units: new Map(items.map((unit) => [unit.unit, unit])) }, reused);
  }));
  return { figure, curves };
}

function lineOf(curve, at, figure) {
  const y = figure === "loss" ? smooth(curve.value) : curve.value;
  return { key: `${at}/${curve.unit}`, tone: clusterTone(at), dash: unitDash(curve.unit), x: curve.tokens, y };
}

function SampleSheet({ runs, samples }) {
  if (!samples.length) return null;
  return html`
    <${Sheet} title="Samples">
      ${samples.map(({ prompt, texts }) => html`
        <h3 key=${prompt}>${prompt}</h3>
        <div class="samples-apart">${texts.map((text, at) => html`
          <figure key=${runs[at].id}>
            <figcaption class="soft small">${runs[at].label}</figcaption>
            <pre>${text ?? "–"}</pre>
          </figure>`)}</div>`)}
    </${Sheet}>`;
}
