/** One colour per unit, the same for a cluster and its sub-model. Beyond eight, dashes distinguish them. */

const COLOURS = 8;
const DASHES = [null, [6, 3], [2, 3]];

/** @param {string} unit `seed`, `seed-2`, `submodel-3`, `finetune` @returns {string} A CSS variable's name. */
export function unitTone(unit) {
  const number = numberOf(unit);
  if (isSeed(unit)) return "--unit-seed";
  return number === null ? "--unit-finetune" : clusterTone(number);
}

/** @param {number} cluster @returns {string} A CSS variable's name. */
export const clusterTone = (cluster) => `--unit-${cluster % COLOURS}`;

/** @param {string} unit @returns {number[] | null} Dashes of its line. */
export function unitDash(unit) {
  const number = numberOf(unit) ?? 0;
  return DASHES[(isSeed(unit) ? number : Math.floor(number / COLOURS)) % DASHES.length];
}

/** The seed or its members first, then sub-models, each by number, and the fine-tune last. @param {string} a @param {string} b */
export function byUnit(a, b) {
  return rank(a) - rank(b) || a.localeCompare(b);
}

function rank(unit) {
  return isSeed(unit) ? (numberOf(unit) ?? 0) - 1e6 : (numberOf(unit) ?? 1e9);
}

function isSeed(unit) {
  return /^seed(-\d+)?$/.test(unit);
}

function numberOf(unit) {
  const found = /-(\d+)$/.exec(unit);
  return found ? Number(found[1]) : null;
}
