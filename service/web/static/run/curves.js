/**
 * Curves of one figure for all units, from the service and from later events.
 * @typedef {{unit: string, stage: string, step: number[], tokens: number[], value: number[]}} Curve
 */

const DECAY = 0.9;

/** Add a progress event; a step that is trained again replaces all points from that step on.
 * @param {Map<string, Curve>} curves @param {import("./fold.js").RunEvent} event @param {string} figure */
export function append(curves, { unit, stage, data }, figure) {
  const value = data[figure];
  if (value == null || !unit) return;
  let curve = curves.get(unit);
  if (!curve) curves.set(unit, (curve = { unit, stage: stage ?? "", step: [], tokens: [], value: [] }));
  let kept = curve.step.length;
  while (kept && curve.step[kept - 1] >= data.step) kept -= 1;
  curve.step.length = curve.tokens.length = curve.value.length = kept;
  curve.step.push(data.step);
  curve.tokens.push(data.tokens);
  curve.value.push(value);
}

/**
 * Exponential moving average, corrected for its start: mean_t = (d mean_{t-1} + (1 - d) x_t) / (1 - d^t), d = 0.9.
 * @param {(number | null)[]} values @returns {(number | null)[]}
 */
export function smooth(values) {
  let sum = 0;
  let seen = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = DECAY * sum + (1 - DECAY) * value;
    seen += 1;
    return sum / (1 - DECAY ** seen);
  });
}

/**
 * Curves over the tokens of the whole run: stages follow each other, and the trainings of a stage share its tokens. A point of a
 * training with t of its T tokens is at S + t P / T, where S are the tokens of the stages before and P those of the stage.
 * @param {Curve[]} curves @param {import("./fold.js").Progress} progress
 * @param {Map<string, number>} [reused] Tokens of stages that were taken from another run, and have no trainings here.
 * @returns {Curve[]}
 */
export function alongRun(curves, { stages, units }, reused = new Map()) {
  const totals = new Map([...units.values()].map((unit) => [unit.unit, unitTokens(unit)]));
  for (const curve of curves) if (!totals.get(curve.unit)) totals.set(curve.unit, curve.tokens.at(-1) ?? 0);
  const ofStage = new Map();
  for (const { unit, stage } of [...units.values(), ...curves.filter((curve) => !units.has(curve.unit))]) {
    ofStage.set(stage, (ofStage.get(stage) ?? 0) + totals.get(unit));
  }
  for (const [stage, tokens] of reused) if (!ofStage.has(stage)) ofStage.set(stage, tokens);
  return placed(curves, stages, ofStage, totals);
}

/**
 * Curves over what the run has spent, in hours or dollars: stages follow each other, all trainings of a stage begin and end with it, and
 * each spends evenly over its tokens so far. `tokens` of the result are places on that axis.
 * @param {Curve[]} curves @param {import("./fold.js").Stage[]} stages @param {Map<string, number>} spent Hours or dollars by stage.
 * @returns {Curve[]}
 */
export function alongSpending(curves, stages, spent) {
  return placed(curves, stages, spent, new Map(curves.map((curve) => [curve.unit, curve.tokens.at(-1) ?? 0])));
}

function placed(curves, stages, ofStage, totals) {
  const starts = new Map();
  let start = 0;
  for (const { name } of stages) {
    starts.set(name, start);
    start += ofStage.get(name) ?? 0;
  }
  return curves.map((curve) => {
    const [from, total] = [starts.get(curve.stage) ?? 0, totals.get(curve.unit)];
    const scale = total ? (ofStage.get(curve.stage) ?? 0) / total : 1;
    return { ...curve, tokens: curve.tokens.map((each) => from + each * scale) };
  });
}

/** Tokens of a training from its first step to its last, as far as its pace says. @param {import("./fold.js").Unit} unit */
const unitTokens = ({ step, steps, tokens }) => (step && steps > step ? (tokens * steps) / step : tokens);

/** Number of points per unit to request, fewer for many units so that the chart stays fast. @param {number} units */
export const pointsFor = (units) => Math.max(150, Math.min(1000, Math.floor(12_000 / Math.max(1, units))));
