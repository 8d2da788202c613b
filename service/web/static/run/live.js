/** A run that is loaded once and then updated by its events. */

import { ask } from "../api.js";
import { watchConnection } from "../connection.js";
import { useEffect, useReducer, useRef } from "../lib.js";
import { append, pointsFor } from "./curves.js";
import { fold } from "./fold.js";
import { followEvents } from "./stream.js";

const BACKFILL = 1000;
const KEPT_EVENTS = 1000;
const REFRESH_MILLISECONDS = 5000;
const RARE_REFRESH_MILLISECONDS = 30_000;
const SETTLE_MILLISECONDS = 300;
const TERMINAL = ["succeeded", "failed", "cancelled"];

/** Announce a text to screen readers. @param {string} words */
function announce(words) {
  document.getElementById("announcer").textContent = words;
}

/** @param {string} state */
export const isTerminal = (state) => TERMINAL.includes(state);

export class LiveRun {
  /** @param {string} id @param {() => void} changed Called after every change. */
  constructor(id, changed) {
    this.id = id;
    this.run = null;
    this.problem = null;
    /** @type {import("./fold.js").Progress} */
    this.progress = { stages: [], units: new Map(), sizes: null };
    /** @type {import("./fold.js").RunEvent[]} */
    this.events = [];
    this.figure = "loss";
    /** @type {Map<string, import("./curves.js").Curve>} */
    this.curves = new Map();
    /** Changes whenever a curve does. */
    this.curvesVersion = 0;
    this.clusters = null;
    this.report = null;
    this._changed = changed;
    this._position = -1;
    this._known = 0;
    this._missed = [];
    this._most = pointsFor(1);
    this._downsampling = false;
    this._ending = new AbortController();
    this._stop = null;
  }

  /** Load the run and follow its events. */
  async start() {
    this._unwatch = watchConnection((reached) => reached && this.refresh());
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh(), { signal: this._ending.signal });
    await this.refresh();
    this._refreshLater();
  }

  /** Stop following. */
  end() {
    this._ending.abort();
    clearTimeout(this._timer);
    clearTimeout(this._soon);
    this._unwatch?.();
    this._stop?.();
  }

  /** Load the run again: state, place in the queue, cost. */
  async refresh() {
    const run = await this._load("");
    if (!run) return;
    const first = this.run === null;
    this._setRun(run);
    if (first && run.config.evaluation?.every_tokens) this.figure = "held_out_loss";
    if (first) await this._loadParts();
    const open = this._stop !== null;
    if (!open && (first || !isTerminal(run.state))) this._follow(first ? run.events : this._known);
    this._changed();
  }

  /** Show another figure's curves. @param {string} figure */
  async setFigure(figure) {
    this.figure = figure;
    this.curves = new Map();
    this._changed();
    await this._loadCurves();
    this._changed();
  }

  _setRun(run) {
    if (this.run && this.run.state !== run.state) {
      announce(`Run ${run.name} is now ${run.state}${run.reason ? `: ${run.reason}` : ""}`);
    }
    this.run = run;
    this.problem = null;
    if (run.stages.length) this.progress.stages = run.stages;
  }

  async _loadParts() {
    const units = await this._load("/submodels");
    for (const unit of units?.items ?? []) this.progress.units.set(unit.unit, unit);
    await Promise.all([this._loadCurves(), this._loadResults()]);
  }

  async _loadCurves() {
    const figure = this.figure;
    const most = pointsFor(this.progress.units.size);
    // Events that arrive during the request may be missing in its response
    this._missed = [];
    const metrics = await this._load(`/metrics?figure=${figure}&points=${most}`);
    if (!metrics || figure !== this.figure) return;
    this.curves = new Map(metrics.series.map((series) => [series.unit, series]));
    for (const event of this._missed) append(this.curves, event, figure);
    this._most = most;
    this.curvesVersion += 1;
  }

  async _loadResults() {
    const done = this.progress.stages.filter((stage) => ["done", "reused"].includes(stage.status)).map((stage) => stage.name);
    if (done.length) this.report = (await this._load("/report", true)) ?? this.report;
    if (done.includes("cluster")) this.clusters ??= await this._load("/clusters", true);
  }

  _follow(from) {
    // Older events are only listed; the loaded data already include them
    this._known = from;
    const after = this._position >= 0 ? this._position : from - 1 - BACKFILL;
    this._stop = followEvents(this.id, Math.max(-1, after), (events) => this._take(events), () => this._ended());
  }

  _take(events) {
    let turned = false;
    for (const event of events) {
      this._position = event.position;
      if (event.position < this._known) continue;
      fold(this.progress, event);
      if (event.type === "progress" || event.type === "evaluation") {
        this._missed.push(event);
        append(this.curves, event, this.figure);
        this.curvesVersion += 1;
      }
      turned ||= event.type === "state" || (event.type.startsWith("stage_") && event.type !== "stage_progress");
    }
    this._known = Math.max(this._known, this._position + 1);
    this.events = [...this.events, ...events.filter((event) => event.type !== "heartbeat")].slice(-KEPT_EVENTS);
    if (this._missed.length > KEPT_EVENTS) this._missed = this._missed.slice(-KEPT_EVENTS);
    if (turned) this._refreshSoon();
    this._downsample();
    this._changed();
  }

  /** Refresh periodically: while hidden, for the title; after the end, because another user can resume the run. */
  _refreshLater() {
    if (this._ending.signal.aborted) return;
    const rarely = document.hidden || (this.run && isTerminal(this.run.state));
    this._timer = setTimeout(async () => {
      await this.refresh();
      this._refreshLater();
    }, rarely ? RARE_REFRESH_MILLISECONDS : REFRESH_MILLISECONDS);
  }

  /** Reload curves that have grown too long, downsampled. */
  async _downsample() {
    const long = [...this.curves.values()].some((curve) => curve.step.length > 2 * this._most);
    if (!long || this._downsampling) return;
    this._downsampling = true;
    await this._loadCurves();
    this._downsampling = false;
  }

  _refreshSoon() {
    clearTimeout(this._soon);
    this._soon = setTimeout(async () => {
      await this.refresh();
      await this._loadResults();
      this._changed();
    }, SETTLE_MILLISECONDS);
  }

  _ended() {
    this._stop = null;
    this._refreshSoon();
  }

  /** @returns {Promise<any>} The response; null after an error, stored in `problem` unless a 404 is allowed (`mayLack`). */
  async _load(part, mayLack = false) {
    try {
      return await ask(`/v1/runs/${this.id}${part}`, { signal: this._ending.signal });
    } catch (error) {
      if (error.name !== "AbortError" && !(mayLack && error.status === 404)) {
        this.problem = error;
        this._changed();
      }
      return null;
    }
  }
}

/** A run that is followed while its view is open. @param {string} id @returns {LiveRun} */
export function useLiveRun(id) {
  const [, redraw] = useReducer((turn) => turn + 1, 0);
  const live = useRef(null);
  if (live.current === null) live.current = new LiveRun(id, () => redraw());
  useEffect(() => {
    live.current.start();
    return () => live.current.end();
  }, []);
  return live.current;
}
