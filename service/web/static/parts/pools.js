/** Pools of the cluster and how much of each is in use. */

import { html } from "../lib.js";
import { decimal, plural, price } from "../words.js";
import { Meter } from "./small.js";

/** @param {{pools: any}} props Response of `GET /v1/pools`; null while it loads. */
export function PoolBars({ pools }) {
  if (!pools) return html`<p class="soft">Loading…</p>`;
  if (!pools.connected) return html`<p class="notice warn">Ray does not answer. Runs continue as soon as it does.</p>`;
  if (!pools.items.length) return html`<p class="soft">The cluster has no pools.</p>`;
  return html`
    <ul class="pools">
      ${pools.items.map((pool) => html`
        <li key=${pool.resource}>
          <span class="pool-name"><code>${pool.resource}</code></span>
          <span class="number">${number(pool.slots - pool.free)} of ${number(pool.slots)} in use</span>
          <${Meter} share=${(pool.slots - pool.free) / (pool.slots || 1)} />
          <span class="soft note">${poolWords(pool)}</span>
        </li>`)}
    </ul>`;
}

/** @returns {string} Nodes, price, pending workers and lost nodes. */
function poolWords(pool) {
  const alive = pool.nodes.filter((node) => node.alive).length;
  const parts = [plural(alive, "node"), pool.gpus ? plural(pool.gpus, "GPU") : "no GPU"];
  if (pool.price_per_hour !== null) parts.push(`${price(pool.price_per_hour)} per worker-hour`);
  if (pool.pending) parts.push(`${plural(pool.pending, "worker")} waiting`);
  if (pool.lost) parts.push(`${plural(pool.lost, "node")} lost in 24 h`);
  return parts.join(" · ");
}

const number = (value) => decimal(value, Number.isInteger(value) ? 0 : 1);
