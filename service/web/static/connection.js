/** Whether the service can be reached. While it cannot, it is asked every two seconds; who waits is told when it is back. */

const PROBE_SECONDS = 2;

/** @type {Set<(reached: boolean) => void>} */
const watchers = new Set();
let lost = false;

/** @param {(reached: boolean) => void} watcher Told of every change. @returns {() => void} Ends it. */
export function watchConnection(watcher) {
  watchers.add(watcher);
  return () => watchers.delete(watcher);
}

/** A request failed on the way. */
export function connectionFailed() {
  if (lost) return;
  lost = true;
  tell();
  probe();
}

function tell() {
  for (const watcher of [...watchers]) watcher(!lost);
}

async function probe() {
  while (lost) {
    await new Promise((done) => setTimeout(done, PROBE_SECONDS * 1000));
    try {
      if ((await fetch("/healthz", { cache: "no-store" })).ok) {
        lost = false;
        tell();
      }
    } catch {
      // still away
    }
  }
}
