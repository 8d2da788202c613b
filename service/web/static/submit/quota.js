/** Quota of the caller. */

import { ask } from "../api.js";
import { html, useEffect, useState } from "../lib.js";
import { dollars } from "../words.js";

/** The caller's quota; null while it loads. @returns {any} */
export function useQuota() {
  const [quota, setQuota] = useState(null);
  useEffect(() => {
    const ending = new AbortController();
    // The form works without it, because the service checks the limits
    ask("/v1/quota", { signal: ending.signal }).then(setQuota, () => {});
    return () => ending.abort();
  }, []);
  return quota;
}

/** @param {{quota: any}} props */
export function Quota({ quota }) {
  if (!quota) return null;
  const { queued_runs: queued, active_runs: active, dollars: spent, disk_bytes: disk, retention } = quota;
  const parts = [
    `${queued.used}${of(queued.limit)} runs queued`,
    `${active.used}${of(active.limit)} active`,
    `${dollars(spent.used)}${of(spent.limit, dollars)} used in ${quota.month}`,
    `${gigabytes(disk.used)}${of(disk.limit, gigabytes)} on disk`,
    retention.days !== null && `finished runs are kept for ${retention.days} days`,
    retention.finished_runs !== null && `the newest ${retention.finished_runs} finished runs are kept`,
  ];
  return html`<p class="soft small">Your quota: ${parts.filter(Boolean).join(", ")}.</p>`;
}

const of = (limit, words = String) => (limit === null ? "" : ` of ${words(limit)}`);

/** Bytes in GB of 10^9, as for disks. @param {number} bytes */
const gigabytes = (bytes) => `${(bytes / 1e9).toFixed(1)} GB`;
