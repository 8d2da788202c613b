/** Event stream of a run without gaps; after a lost connection or a hidden page the browser continues at its last event. */

import { ask, here } from "../api.js";
import { whileVisible } from "../polling.js";

const TYPES = [
  "run_started", "run_finished", "run_failed", "run_stopped", "ray_starting", "stage_started", "stage_skipped", "stage_finished", "stage_progress",
  "unit_started", "progress", "checkpoint", "evaluation", "unit_finished", "unit_let_go", "sync", "clusters", "worker_restarted", "workers_held",
  "workers_released", "slots_free", "nodes_asked", "nodes_let_go", "warning", "heartbeat", "state",
];
const GATHER_MILLISECONDS = 100;
const RETRY_MILLISECONDS = 2000;

/**
 * Follow the stream while the page is visible. Events come in batches, so that a burst causes one redraw.
 * @param {string} id
 * @param {number} after Position of the last known event; -1 for none.
 * @param {(events: import("./fold.js").RunEvent[]) => void} take
 * @param {() => void} ended Called when the run has ended and all events were sent.
 * @returns {() => void} Stops following.
 */
export function followEvents(id, after, take, ended) {
  let source = null;
  let last = after;
  let batch = [];
  let gathering = 0;
  let retrying = 0;

  const flush = () => {
    gathering = 0;
    const events = batch;
    batch = [];
    if (events.length) take(events);
  };
  const receive = (message) => {
    last = Number(message.lastEventId);
    batch.push({ ...JSON.parse(message.data), position: last });
    gathering ||= setTimeout(flush, GATHER_MILLISECONDS);
  };
  const finish = () => {
    stop();
    flush();
    ended();
  };
  const failed = () => {
    // A response that is not a stream (a proxy's page, a starting service) closes the source for good
    if (source.readyState === EventSource.CLOSED) retrying = setTimeout(open, RETRY_MILLISECONDS);
    // EventSource gives no reason; this request shows whether the service is unreachable or the session has ended
    ask("/v1/identity").catch(() => {});
  };
  const open = () => {
    source = new EventSource(here(`/v1/runs/${id}/events${last < 0 ? "" : `?after=${last}`}`));
    for (const type of TYPES) source.addEventListener(type, receive);
    source.addEventListener("end", finish);
    source.addEventListener("error", failed);
    return close;
  };
  const close = () => {
    clearTimeout(retrying);
    source.close();
  };
  const leave = whileVisible(open);
  const stop = () => {
    clearTimeout(gathering);
    leave();
  };
  return stop;
}
