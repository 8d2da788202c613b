/** One run, live: stages, curves, cost and results. */

import { ask, ConnectionLost } from "../api.js";
import { html, useEffect } from "../lib.js";
import { PoolBars } from "../parts/pools.js";
import { Notice, Sheet } from "../parts/small.js";
import { usePolled } from "../polling.js";
import { Clusters } from "../run/clusters.js";
import { CurvesSheet } from "../run/curves_sheet.js";
import { EventList } from "../run/events.js";
import { FailureCard } from "../run/failure.js";
import { RunHeader } from "../run/header.js";
import { isTerminal, useLiveRun } from "../run/live.js";
import { Logs } from "../run/logs.js";
import { Money } from "../run/money.js";
import { Results } from "../run/results.js";
import { StageTrack } from "../run/stages.js";
import { UnitTable } from "../run/units.js";
import { RunVerdict } from "../run/verdict.js";

const POOL_SECONDS = 10;

/** @param {{id: string}} props */
export function RunView({ id }) {
  const live = useLiveRun(id);
  const { value: pools } = usePolled((signal) => ask("/v1/pools", { signal }), POOL_SECONDS, []);
  const { run, progress, report, clusters } = live;
  useEffect(() => {
    if (run) document.title = `${run.name} (${run.state}) · MoE-DisCo`;
  }, [run?.name, run?.state]);
  if (!run) {
    return live.problem && !(live.problem instanceof ConnectionLost)
      ? html`
        <div class="empty">
          <h1>No run to show</h1>
          <${Notice} problem=${live.problem} />
          <p><a href="#/runs">All runs</a></p>
        </div>`
      : html`<p class="empty">Loading…</p>`;
  }
  const active = !isTerminal(run.state) && run.state !== "queued";
  return html`
    <${RunHeader} run=${run} acted=${() => live.refresh()} />
    <${Notice} problem=${live.problem} />
    <${RunVerdict} report=${report} parentLoss=${run.parent_held_out_loss} />
    <div class="grid run">
      <${FailureCard} run=${run} />
      <${StageTrack} stages=${progress.stages} active=${active} />
      <${CurvesSheet} live=${live} version=${live.curvesVersion} />
      <${UnitTable} units=${progress.units} active=${active} />
      <${Money} run=${run} changed=${() => live.refresh()} />
      <${Sheet} title="Pools" span="half"><${PoolBars} pools=${pools} /></${Sheet}>
      <${Clusters} sizes=${progress.sizes} clusters=${clusters} evaluation=${report?.evaluation} />
      <${Results} report=${report} />
      <${Logs} id=${id} active=${active} />
      <${EventList} events=${live.events} />
    </div>`;
}
