/** Why a run failed: cause, last lines of the log, and a retry that begins with what may help. */

import { askText } from "../api.js";
import { html, useEffect, useState } from "../lib.js";
import { mayEdit } from "../parts/projects.js";
import { Sheet } from "../parts/small.js";
import { retryAddress } from "../router.js";

const LINES = 12;

/** @param {{run: any}} props */
export function FailureCard({ run }) {
  const { failure } = run;
  const [lines, setLines] = useState(null);
  const log = failure?.unit ? `${failure.unit}.0` : "driver";
  useEffect(() => {
    if (!failure) return undefined;
    const ending = new AbortController();
    const read = (name) => askText(`/v1/runs/${run.id}/logs/${encodeURIComponent(name)}?tail=${LINES}`, { signal: ending.signal });
    // A worker that was lost with its machine may have left no log
    read(log).catch(() => read("driver")).then(setLines, () => setLines(null));
    return () => ending.abort();
  }, [run.id, run.attempt, log, Boolean(failure)]);
  if (!failure) return null;
  const changes = Object.entries(failure.changes);
  const place = [failure.stage && `in ${failure.stage}`, failure.unit].filter(Boolean).join(", ");
  const tools = mayEdit(run) && changes.length > 0 && html`
    <a class="button primary" href=${retryAddress(run.id, failure.changes)}>Retry with ${failure.meaning}</a>`;
  return html`
    <${Sheet} title="Why it failed" note=${place} tools=${tools}>
      <p>${run.reason}</p>
      ${changes.map(([path, value]) => html`<p class="soft small" key=${path}>The retry sets <code>${path}</code> to ${value}.</p>`)}
      ${changes.length === 0 && failure.setting && html`<p class="soft small">The setting to look at is <code>${failure.setting}</code>.</p>`}
      ${lines && html`<h3 class="held">Last lines of its log</h3><pre class="log-end" tabindex="0" aria-label="Last lines of its log">${lines}</pre>`}
    </${Sheet}>`;
}
