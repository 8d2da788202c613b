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

/** Number of points per unit to request, fewer for many units so that the chart stays fast. @param {number} units */
export const pointsFor = (units) => Math.max(150, Math.min(1000, Math.floor(12_000 / Math.max(1, units))));
