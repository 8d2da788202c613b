/** Curves of all units of a run, with a legend that shows their values and toggles their lines. */

import { html, useMemo, useState } from "../lib.js";
import { LineChart } from "../parts/line_chart.js";
import { Choices, Sheet } from "../parts/small.js";
import { count, decimal, dollars, now, percent } from "../words.js";
import { alongRun, alongSpending, smooth } from "./curves.js";
import { byUnit, unitDash, unitTone } from "./palette.js";

/** Maximum number of lines that are readable with their raw values behind them. */
const FEW = 8;
/** The figure that is measured on so much text that a mean over time would only hide its newest values. */
const MEASURED = "held_out_loss";
const FIGURES = [
  ["held_out_loss", "held-out loss"], ["loss", "loss"], ["lr", "learning rate"], ["grad_norm", "gradient norm"],
  ["tokens_per_second", "tokens/s"], ["mfu", "MFU"], ["largest_load", "largest expert load"], ["dead_experts", "dead experts"],
];
/** Format with enough decimals to distinguish two ticks: 1 for a step of 0.5, 2 for one of 0.25. */
function plain(value, step) {
  const whole = (digits) => Number.isInteger(Number((step * 10 ** digits).toFixed(6)));
  return decimal(value, [0, 1, 2, 3, 4].find(whole) ?? 5);
}

const scientific = (value) => (value === 0 ? "0" : value.toExponential(1));
const AXES = {
  held_out_loss: plain, loss: plain, lr: scientific, grad_norm: plain, tokens_per_second: count, mfu: percent, largest_load: plain,
  dead_experts: plain,
};
const FORMATS = {
  held_out_loss: (value) => decimal(value, 3),
  loss: (value) => decimal(value, 3),
  lr: scientific,
  grad_norm: (value) => decimal(value, 2),
  tokens_per_second: count,
  mfu: percent,
  largest_load: (value) => decimal(value, 2),
  dead_experts: count,
};

/** What the horizontal axis counts, with the words for a place on it. */
const ALONG = {
  tokens: { title: "tokens", words: (x) => `${count(x)} tokens` },
  hours: { title: "hours", words: (x) => `${decimal(x, 2)} h` },
  dollars: { title: "dollars", words: dollars },
};
const ALONG_CHOICES = Object.entries(ALONG).map(([key, { title }]) => [key, title]);

/** Curves over tokens, hours or dollars of the whole run. */
function along(axis, curves, { progress, run }) {
  if (axis === "tokens") return alongRun(curves, progress);
  const spent = new Map();
  if (axis === "dollars") for (const line of run.bill.lines) spent.set(line.stage, (spent.get(line.stage) ?? 0) + (line.dollars ?? 0));
  else for (const { name, started, seconds } of progress.stages) spent.set(name, (seconds ?? (started === null ? 0 : now() - started)) / 3600);
  return alongSpending(curves, progress.stages, spent);
}

const EMPTY = {
  [MEASURED]: "The held-out loss is measured during training if evaluation.every_tokens is set.",
};

/** @param {{live: import("./live.js").LiveRun, curves: Map<string, import("./curves.js").Curve>, version: unknown}} props
 *   `version` changes when a curve does. */
export function CurvesSheet({ live, version }) {
  const [smoothed, setSmoothed] = useState(true);
  const [logarithmic, setLogarithmic] = useState(false);
  const [axis, setAxis] = useState("tokens");
  const [hidden, setHidden] = useState(new Set());
  const [pointed, setPointed] = useState(null);
  const curves = useMemo(
    () => along(axis, [...live.curves.values()].sort((a, b) => byUnit(a.unit, b.unit)), live), [version, live.curves, axis]);
  const shown = useMemo(() => curves.filter((curve) => !hidden.has(curve.unit)), [curves, hidden]);
  const averaged = smoothed && live.figure !== MEASURED;
  const lines = useMemo(() => shown.flatMap((curve) => linesOf(curve, averaged, shown.length <= FEW)), [shown, averaged]);
  const format = FORMATS[live.figure];
  const words = FIGURES.find(([figure]) => figure === live.figure)[1];
  const isShown = (curve) => String(!hidden.has(curve.unit));
  const toggle = (unit) => {
    const next = new Set(hidden);
    if (!next.delete(unit)) next.add(unit);
    setHidden(next);
  };
  const toggleAll = () => setHidden(new Set(hidden.size ? [] : curves.map((curve) => curve.unit)));
  const tools = html`
    <div class="actions">
      <${Choices} label="Figure" options=${FIGURES} value=${live.figure} choose=${(figure) => live.setFigure(figure)} />
      <${Choices} label="Along" options=${ALONG_CHOICES} value=${axis} choose=${setAxis} />
      <${Choices} label="Smoothing" options=${[["on", "smooth"], ["off", "raw"]]} value=${smoothed ? "on" : "off"}
        choose=${(choice) => setSmoothed(choice === "on")} />
      <${Choices} label="Scale" options=${[["linear", "linear"], ["log", "log"]]} value=${logarithmic ? "log" : "linear"}
        choose=${(choice) => setLogarithmic(choice === "log")} />
    </div>`;
  return html`
    <${Sheet} title="Training" note=${pointed === null ? `over the run's ${ALONG[axis].title}` : `at ${ALONG[axis].words(pointed)}`} tools=${tools}>
      ${curves.length === 0
        ? html`<p class="empty">${EMPTY[live.figure] ?? "Curves appear with the first training steps."}</p>`
        : html`
          <${LineChart} label=${`Curves of ${words} over the run's ${ALONG[axis].title}, one per unit; the table of units shows the current values`}
            lines=${lines} format=${logarithmic ? format : AXES[live.figure]} logarithmic=${logarithmic} point=${setPointed} />
          <ul class="legend">
            ${curves.length > FEW && html`
              <li><button type="button" class="plain" onClick=${toggleAll}>${hidden.size ? "Show all" : "Hide all"}</button></li>`}
            ${curves.map((curve) => html`
              <li key=${curve.unit}>
                <button type="button" class="plain" aria-pressed=${isShown(curve)} onClick=${() => toggle(curve.unit)}>
                  <${LineMark} unit=${curve.unit} />${curve.unit}
                  <span class="number">${valueAt(curve, pointed, format)}</span>
                </button>
              </li>`)}
          </ul>`}
    </${Sheet}>`;
}

/** Sample of a unit's line in the legend. */
const LineMark = ({ unit }) => html`
  <svg class="mark" width="20" height="8" aria-hidden="true">
    <line
      x1="1" y1="4" x2="19" y2="4" stroke-width="2.5"
      stroke=${`var(${unitTone(unit)})`} stroke-dasharray=${unitDash(unit)?.join(" ")}
    />
  </svg>`;

function linesOf(curve, smoothed, withRaw) {
  const { unit, tokens, value } = curve;
  const line = { key: unit, tone: unitTone(unit), dash: unitDash(unit), x: tokens.slice(), y: value.slice() };
  if (!smoothed) return [line];
  const mean = { ...line, y: smooth(value) };
  return withRaw ? [{ ...line, faint: true, dash: null }, mean] : [mean];
}

/** The value under the pointer, or otherwise the newest value. */
function valueAt(curve, tokens, format) {
  if (!curve.value.length) return "";
  let at = curve.value.length - 1;
  if (tokens !== null) {
    at = curve.tokens.findLastIndex((each) => each <= tokens);
    if (at < 0) return "–";
  }
  const value = curve.value[at];
  return value === null ? "–" : format(value);
}
