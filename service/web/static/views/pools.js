/** Pools of the cluster and their nodes. */

import { ask, here } from "../api.js";
import { html } from "../lib.js";
import { PoolBars } from "../parts/pools.js";
import { Notice, Outside, Scroll, Sheet } from "../parts/small.js";
import { usePolled } from "../polling.js";

const COLUMNS = ["Address", "State", "Pools", "Resources", "Labels"];
const REFRESH_SECONDS = 5;

/** @param {{dashboard: string | null}} props Path of the Ray dashboard, for administrators. */
export function PoolsView({ dashboard }) {
  const { value: pools, problem } = usePolled((signal) => ask("/v1/pools", { signal }), REFRESH_SECONDS, []);
  const nodes = nodesOf(pools?.items ?? []);
  return html`
    <div class="heading">
      <div class="lead"><h1>Pools</h1></div>
      ${dashboard && html`<div class="actions"><${Outside} address=${here(dashboard)}>Ray dashboard</${Outside}></div>`}
    </div>
    <${Notice} problem=${problem} />
    <div class="grid">
      <${Sheet} title="Usage"><${PoolBars} pools=${pools} /></${Sheet}>
      ${nodes.length > 0 && html`
        <${Sheet} title="Nodes" note=${String(nodes.length)}>
          <${Scroll} label="Nodes">
            <table>
              <thead><tr>${COLUMNS.map((title) => html`<th scope="col">${title}</th>`)}</tr></thead>
              <tbody>${nodes.map(({ node, pools: names }) => html`
                <tr key=${node.id}>
                  <th scope="row">${node.address}</th>
                  <td>${node.alive ? "alive" : "lost"}</td>
                  <td><code>${names.join(", ")}</code></td>
                  <td class="soft">${resourceWords(node.resources)}</td>
                  <td class="soft">${Object.entries(node.labels).map(([key, value]) => `${key}=${value}`).join(", ")}</td>
                </tr>`)}</tbody>
            </table>
          </${Scroll}>
        </${Sheet}>`}
    </div>`;
}

/** Each node once, with its pools. */
function nodesOf(pools) {
  const nodes = new Map();
  for (const pool of pools) {
    for (const node of pool.nodes) {
      const entry = nodes.get(node.id) ?? { node, pools: [] };
      entry.pools.push(pool.resource);
      nodes.set(node.id, entry);
    }
  }
  return [...nodes.values()];
}

const resourceWords = (resources) =>
  Object.entries(resources).filter(([name]) => !name.startsWith("node:")).map(([name, amount]) => {
    const bytes = name === "memory" || name === "object_store_memory";
    return `${name} ${bytes ? `${Math.round(amount / 2 ** 30)} GiB` : amount}`;
  }).join(", ");
