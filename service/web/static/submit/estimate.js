/** Live estimate of a configuration: fit, memory, time and cost. */

import { ask } from "../api.js";
import { watchConnection } from "../connection.js";
import { html, useEffect, useState } from "../lib.js";
import { Meter, NumberHeads, Scroll, Sheet, Verdict } from "../parts/small.js";
import { count, dollars, duration, gigabytes, plural } from "../words.js";

const PAUSE_MILLISECONDS = 350;
const AGAIN_MILLISECONDS = 1000;
const GIB = 2 ** 30;

/** The request for the estimate of a new run. @param {Record<string, any>} config */
export const ofNewRun = (config) => ({ path: "/v1/estimates", body: { config } });

/**
 * The service's estimate of a configuration, requested when the user stops typing and when the connection is back.
 * @param {Record<string, any> | null} config @param {string} text Text of the configuration and all else that identifies changes.
 * @param {(config: Record<string, any>) => {path: string, body: any}} requestOf
 * @returns {{plan: any, problem: Error | null, busy: boolean}} `plan` keeps the old estimate while the next one loads.
 */
export function useEstimate(config, text, requestOf) {
  const [answer, setAnswer] = useState({ plan: null, problem: null, of: null });
  useEffect(() => {
    if (config === null) return undefined;
    const ending = new AbortController();
    let timer;
    const load = async () => {
      try {
        const { path, body } = requestOf(config);
        const plan = await ask(path, { method: "POST", body, signal: ending.signal });
        setAnswer({ plan, problem: null, of: text });
      } catch (error) {
        if (ending.signal.aborted) return;
        // The service computes one estimate at a time; another page of the same user has asked for a newer one
        if (error.status === 429) timer = setTimeout(load, AGAIN_MILLISECONDS);
        else setAnswer((before) => ({ plan: before.plan, problem: error, of: text }));
      }
    };
    timer = setTimeout(load, PAUSE_MILLISECONDS);
    const unwatch = watchConnection((reached) => reached && load());
    return () => {
      clearTimeout(timer);
      unwatch();
      ending.abort();
    };
  }, [text]);
  return { plan: answer.plan, problem: answer.problem, busy: answer.of !== text };
}

/** @param {{plan: any, stale: boolean}} props `stale`: whether the estimate is for an earlier text. */
export function Estimate({ plan, stale }) {
  if (!plan) {
    return html`
      <${Sheet} title="Estimate"><p class="soft">An estimate appears as soon as the configuration is complete.</p></${Sheet}>`;
  }
  const { bill } = plan;
  const reusing = (plan.reuses ?? []).length > 0;
  const cost = reusing ? plan.dollars_with_reuse : bill.dollars;
  return html`
    <${Sheet} title="Estimate" note=${stale ? "outdated" : ""}>
      <div class=${stale ? "estimate stale" : "estimate"} aria-busy=${stale}>
        <p class="verdict ${!plan.fits ? "" : plan.fits_known ? "fits" : "open"}" role="status">
          ${!plan.fits ? "Does not fit the pools" : plan.fits_known ? "Fits the pools" : "Fits the pools by memory_gb; the memory of the host is unknown"}
        </p>
        ${plan.reuse_in_words && html`<p class="reuse">${capital(plan.reuse_in_words)}.</p>`}
        <dl class="figures">
          <div><dt>${reusing ? "Time without reuse" : "Time"}</dt><dd>${duration(bill.seconds)}</dd></div>
          <div><dt>Cost</dt><dd>${cost === null ? "unknown" : dollars(cost)}</dd></div>
          ${!reusing && bill.baseline && html`<div><dt>Cheapest other way</dt><dd>${dollars(bill.baseline.dollars)}</dd></div>`}
        </dl>
        ${!reusing && html`<${Verdict} bill=${plan} />`}
        <h3>Memory per worker</h3>
        <ul class="memory">${[...plan.stages, ...plan.inference].map((stage) => html`<${StageMemory} key=${stage.stage} stage=${stage} />`)}</ul>
        <h3>Stages</h3>
        <${StageCosts} plan=${plan} />
        ${plan.speeds.map((speed) => html`
          <p class="soft small" key=${speed.pool}>Speed of ${speed.pool.replace("_", "-")}: ${speed.source}.</p>`)}
        <p class="soft small">
          ${count(plan.parameters.total)} parameters, ${count(plan.parameters.active)} active per token;
          ${" "}${plural(plan.clusters, "sub-model")} of ${count(plan.stages[0].parameters.total)} each,
          ${" "}${plural(plan.experts_per_submodel, "expert")} per layer.
        </p>
        <p class="soft small">Assumed: ${plan.assumptions}.</p>
        ${plan.notes.map((note) => html`<p class="soft small" key=${note}>${note}.</p>`)}
      </div>
    </${Sheet}>`;
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

function StageMemory({ stage }) {
  const total = stage.memory.total / GIB;
  return html`
    <li>
      <span>${stage.stage}</span>
      <span class="number">${gigabytes(stage.memory.total)} of ${stage.pool_gb} GiB</span>
      <${Meter} share=${total / stage.pool_gb} tone="var(--good)" over=${!stage.fits} />
      ${stage.remedy && html`<span class="remedy">${remedyWords(stage.remedy)}</span>`}
    </li>`;
}

/** @param {{fits: boolean, settings: string[], memory_gb: number}} remedy */
function remedyWords({ fits, settings, memory_gb: needed }) {
  const list = settings.map((setting) => setting.replace("=", ": ")).join(", ");
  if (fits) return html`Fits with <code>${list}</code>`;
  const least = settings.length > 0 && html`, even with <code>${list}</code>`;
  return html`No setting makes it fit: a worker would need ${Math.ceil(needed)} GiB${least}`;
}

const StageCosts = ({ plan }) => html`
  <${Scroll} label="Stages of the estimate">
    <table>
      <thead><tr>
        <th scope="col">Stage</th>
        <th scope="col">Pool</th>
        <${NumberHeads} titles=${["Time", "Cost"]} />
      </tr></thead>
      <tbody>${plan.estimates.map((stage) => html`
        <tr key=${stage.stage}>
          <th scope="row">${stage.stage}</th>
          <td class="soft">${stage.pool.replace("_", "-")}</td>
          <td class="number">${duration(stage.seconds)}</td>
          <td class="number">${stage.dollars === null ? "unknown" : dollars(stage.dollars)}</td>
        </tr>`)}</tbody>
    </table>
  </${Scroll}>`;
