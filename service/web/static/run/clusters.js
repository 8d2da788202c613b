/** Clusters of the documents: sizes, perplexity, typical words and a map. */

import { html, useLayoutEffect, useRef } from "../lib.js";
import { colour, useDark } from "../parts/colours.js";
import { Meter, Sheet } from "../parts/small.js";
import { count, decimal, percent, plural, whole } from "../words.js";
import { clusterTone } from "./palette.js";

const COLUMNS = [
  ["Cluster", ""], ["Tokens", "number"], ["Size", ""], ["Documents", "number"], ["Perplexity", "number"], ["Typical words", ""],
];
const TERMS = 8;
const DOT = 1.7;
const MARGIN = 8;

/**
 * @param {{sizes: {documents: number[], tokens: number[]} | null, clusters: any, evaluation: any}} props
 *   `sizes`: sizes from the event stream, available first. `clusters`: report of the clusters. `evaluation`: part of the run's report.
 */
export function Clusters({ sizes, clusters, evaluation }) {
  const rows = rowsOf(sizes, clusters, evaluation);
  if (!rows.length) return null;
  const total = rows.reduce((sum, row) => sum + row.tokens, 0) || 1;
  const most = Math.max(1, ...rows.map((row) => row.tokens));
  const map = clusters?.map?.x?.length ? clusters.map : null;
  return html`
    <${Sheet} title="Clusters" note=${noteOf(clusters, rows.length)} span=${map ? "wide" : ""}>
      <table class="rows clusters" role="table">
        <thead role="rowgroup"><tr role="row">
          ${COLUMNS.map(([title, style]) => html`<th role="columnheader" scope="col" class=${style}>${title}</th>`)}
        </tr></thead>
        <tbody role="rowgroup">${rows.map((row, cluster) => html`
          <tr role="row" key=${cluster}>
            <th role="rowheader" scope="row" class="name">
              <span class="named"><i class="swatch" style=${{ "--tone": `var(${clusterTone(cluster)})` }}></i>${cluster}</span>
            </th>
            <td role="cell" class="number" data-label="tokens">
              ${count(row.tokens)} <span class="soft">${percent(row.tokens / total)}</span>
            </td>
            <td role="cell" class="size full"><${Meter} share=${row.tokens / most} tone=${`var(${clusterTone(cluster)})`} /></td>
            <td role="cell" class="number" data-label="documents">${whole(row.documents)}</td>
            <td role="cell" class="number" data-label="perplexity">${decimal(row.perplexity, 2)}</td>
            <td role="cell" class="terms full">${row.terms.join(", ")}</td>
          </tr>`)}</tbody>
      </table>
    </${Sheet}>
    ${map && html`
      <${Sheet} title="Map" note=${`${plural(map.x.length, "document")}, two main axes`} span="narrow">
        <${ClusterMap} map=${map} />
      </${Sheet}>`}`;
}

function rowsOf(sizes, clusters, evaluation) {
  const measured = new Map((evaluation?.clusters ?? []).map((entry) => [entry.cluster, entry.perplexity]));
  const streamed = (sizes?.tokens ?? []).map((tokens, k) => ({ tokens, documents: sizes.documents[k] ?? 0 }));
  const entries = clusters?.clusters ?? streamed;
  return entries.map((entry, k) => ({
    tokens: entry.tokens, documents: entry.documents, terms: (entry.terms ?? []).slice(0, TERMS), perplexity: measured.get(k),
  }));
}

function noteOf(clusters, number) {
  if (!clusters) return `${number}`;
  const parts = [`largest ${decimal(clusters.balance, 2)} × mean`];
  if (clusters.silhouette != null) parts.push(`silhouette ${decimal(clusters.silhouette, 3)}`);
  if (clusters.nmi != null) parts.push(`agreement with sources ${decimal(clusters.nmi, 3)}`);
  return parts.join(" · ");
}

/** Documents as dots, coloured by cluster. */
function ClusterMap({ map }) {
  const canvas = useRef(null);
  const dark = useDark();
  useLayoutEffect(() => {
    const place = canvas.current;
    const fitting = new ResizeObserver(() => draw(place, map));
    fitting.observe(place);
    return () => fitting.disconnect();
  }, [map, dark]);
  const label = "Documents in the plane of the two main axes of their vectors, coloured by cluster";
  return html`<canvas class="map" ref=${canvas} role="img" aria-label=${label}></canvas>`;
}

function draw(canvas, { x, y, cluster }) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const ratio = devicePixelRatio;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const across = scale(x, MARGIN, width - MARGIN);
  const down = scale(y, height - MARGIN, MARGIN);
  const tones = new Map();
  pen.globalAlpha = 0.6;
  for (let i = 0; i < x.length; i += 1) {
    const name = clusterTone(cluster[i]);
    if (!tones.has(name)) tones.set(name, colour(name));
    pen.fillStyle = tones.get(name);
    pen.beginPath();
    pen.arc(across(x[i]), down(y[i]), DOT, 0, 2 * Math.PI);
    pen.fill();
  }
}

/** A linear map from the values' range onto a range of pixels. */
function scale(values, from, to) {
  const low = Math.min(...values);
  const range = Math.max(...values) - low || 1;
  return (value) => from + ((value - low) / range) * (to - from);
}
