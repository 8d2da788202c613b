/** Connection to the service. While it is lost, a request every two seconds checks it; watchers are called on every change. */

const PROBE_SECONDS = 2;

/** @type {Set<(reached: boolean) => void>} */
const watchers = new Set();
let lost = false;

/** @param {(reached: boolean) => void} watcher Called on every change. @returns {() => void} Removes the watcher. */
export function watchConnection(watcher) {
  watchers.add(watcher);
  return () => watchers.delete(watcher);
}

/** Report a request that did not reach the service. */
export function connectionFailed() {
  if (lost) return;
  lost = true;
  notify();
  probe();
}

function notify() {
  for (const watcher of [...watchers]) watcher(!lost);
}

async function probe() {
  while (lost) {
    await new Promise((done) => setTimeout(done, PROBE_SECONDS * 1000));
    try {
      if ((await fetch("healthz", { cache: "no-store" })).ok) {
        lost = false;
        notify();
      }
    } catch {
      // still unreachable
    }
  }
}
