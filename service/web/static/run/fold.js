/**
 * Folds a run's events into the progress that the page shows.
 * @typedef {{type: string, stage: string | null, unit: string | null, data: Record<string, any>, time: number,
 *   position: number}} RunEvent
 * @typedef {{unit: string, stage: string, status: "running" | "restarting" | "done", step: number, steps: number, tokens: number,
 *   loss: number | null, tokens_per_second: number | null, mfu: number | null, restarts: number, workers: number, node: string | null,
 *   started: number | null, ended: number | null}} Unit
 * @typedef {{name: string, status: "waiting" | "running" | "done" | "reused" | "failed", started: number | null,
 *   seconds: number | null}} Stage
 * @typedef {{stages: Stage[], units: Map<string, Unit>, sizes: {documents: number[], tokens: number[]} | null}} Progress
 */

const FRESH = {
  status: "running", step: 0, steps: 0, tokens: 0, loss: null, tokens_per_second: null, mfu: null, restarts: 0, workers: 1, node: null,
  started: null, ended: null,
};

/** Fold one event. @param {Progress} progress @param {RunEvent} event */
export function fold(progress, event) {
  if (event.type === "stage_progress") return;
  if (event.stage && event.type.startsWith("stage_")) foldStage(progress, event);
  else if (event.unit) foldUnit(progress, event);
  else if (event.type === "run_started") startAgain(progress, event);
  else if (event.type === "run_failed" || event.type === "run_stopped") stopStages(progress, event);
  else if (event.type === "clusters") progress.sizes = { documents: event.data.documents ?? [], tokens: event.data.tokens ?? [] };
}

function foldStage(progress, { type, stage: name, data, time }) {
  progress.stages = progress.stages.map((stage) => {
    if (stage.name !== name) return stage;
    if (type === "stage_started") return { ...stage, status: "running", started: time, seconds: null };
    if (type === "stage_skipped") return { ...stage, status: "reused" };
    return { ...stage, status: "done", seconds: data.seconds ?? time - (stage.started ?? time) };
  });
}

function foldUnit(progress, { type, stage, unit: name, data, time }) {
  // Ignored because its `steps` are the steps made, not those planned
  if (type === "unit_let_go") data = {};
  const unit = { ...(progress.units.get(name) ?? { ...FRESH, unit: name, stage: stage ?? "" }) };
  for (const key of ["step", "steps", "loss", "tokens_per_second", "mfu", "workers", "node"]) if (data[key] != null) unit[key] = data[key];
  // In unit_started, `tokens` is the planned number; in other events, the number trained on so far
  if (type !== "unit_started" && data.tokens != null) unit.tokens = data.tokens;
  if (type === "unit_started") Object.assign(unit, { status: "running", started: unit.started ?? time, ended: null });
  if (type === "progress") unit.status = "running";
  if (type === "worker_restarted") Object.assign(unit, { status: "restarting", restarts: unit.restarts + 1 });
  if (type === "unit_let_go") Object.assign(unit, { status: "done", ended: time });
  if (type === "unit_finished") Object.assign(unit, { status: "done", step: unit.steps, ended: time });
  progress.units.set(name, unit);
}

function startAgain(progress, { data }) {
  const names = data.stages ?? progress.stages.map((stage) => stage.name);
  progress.stages = names.map((name) => ({ name, status: "waiting", started: null, seconds: null }));
  for (const [name, unit] of progress.units) if (unit.status === "running") progress.units.set(name, { ...unit, status: "restarting" });
}

function stopStages(progress, { type, time }) {
  const status = type === "run_failed" ? "failed" : "waiting";
  progress.stages = progress.stages.map((stage) =>
    stage.status === "running" ? { ...stage, status, seconds: time - (stage.started ?? time) } : stage);
}

/** Remaining seconds of a unit at its current speed; null if unknown. @param {Unit} unit */
export function secondsLeft(unit) {
  if (unit.status !== "running" || !unit.tokens_per_second || !unit.step) return null;
  return ((unit.steps - unit.step) * (unit.tokens / unit.step)) / unit.tokens_per_second;
}
