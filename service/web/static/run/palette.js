/** One colour per unit, the same for a cluster and its sub-model. Beyond eight, dashes distinguish them. */

const COLOURS = 8;
const DASHES = [null, [6, 3], [2, 3]];

/** @param {string} unit `seed`, `submodel-3`, `finetune` @returns {string} A CSS variable's name. */
export function unitTone(unit) {
  const number = numberOf(unit);
  return number === null ? (unit === "seed" ? "--unit-seed" : "--unit-finetune") : clusterTone(number);
}

/** @param {number} cluster @returns {string} A CSS variable's name. */
export const clusterTone = (cluster) => `--unit-${cluster % COLOURS}`;

/** @param {string} unit @returns {number[] | null} Dashes of its line. */
export function unitDash(unit) {
  return DASHES[Math.floor((numberOf(unit) ?? 0) / COLOURS) % DASHES.length];
}

/** Seed first, sub-models by number, fine-tune last. @param {string} a @param {string} b */
export function byUnit(a, b) {
  return rank(a) - rank(b) || a.localeCompare(b);
}

function rank(unit) {
  return unit === "seed" ? -1 : (numberOf(unit) ?? 1e9);
}

function numberOf(unit) {
  const found = /-(\d+)$/.exec(unit);
  return found ? Number(found[1]) : null;
}
