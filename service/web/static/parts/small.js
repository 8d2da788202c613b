/** Small parts that several views use. */

import { ConnectionLost } from "../api.js";
import { html } from "../lib.js";

/** A run's state. @param {{state: string}} props */
export const StatePill = ({ state }) => html`<span class=${`pill ${state}`}>${state}</span>`;

/** An error message; a lost connection is shown by the banner instead. @param {{problem: Error | null}} props */
export function Notice({ problem }) {
  if (!problem || problem instanceof ConnectionLost) return null;
  const mistakes = problem.mistakes ?? [];
  return html`
    <div class="notice" role="alert">
      <strong>${sentence(problem.message)}</strong>
      ${mistakes.length > 0 && html`
        <ul>${mistakes.map((mistake) => html`<li><code>${mistake.field}</code> ${mistake.message}</li>`)}</ul>`}
    </div>`;
}

/** Capitalise a message that begins with a word, but not one that begins with the path of a setting. */
const sentence = (message) => (/^[a-z]+\s/.test(message) ? message[0].toUpperCase() + message.slice(1) : message);

/** A share as a bar; hidden from screen readers because the numbers are next to it. @param {{share: number, tone?: string, over?: boolean}} props */
export const Meter = ({ share, tone, over = false }) => html`
  <span class=${over ? "meter over" : "meter"} style=${{ "--tone": over ? null : tone }} aria-hidden="true">
    <i style=${{ "--share": Math.max(0, Math.min(1, share || 0)) }}></i>
  </span>`;

/** A titled part of a view. @param {{title: string, note?: string, tools?: unknown, span?: string, children: unknown}} props */
export function Sheet({ title, note, tools, span = "", children }) {
  return html`
    <section class=${`sheet ${span}`} aria-label=${title}>
      <header><h2>${title}${note && html`<small>${note}</small>`}</h2>${tools}</header>
      ${children}
    </section>`;
}

/**
 * A choice of one option, as toggle buttons.
 * @param {{label: string, options: [string, string][], value: string, choose: (value: string) => void}} props
 */
export const Choices = ({ label, options, value, choose }) => html`
  <div class="choices" role="group" aria-label=${label}>
    ${options.map(([key, words]) => html`
      <button type="button" key=${key} aria-pressed=${String(key === value)} onClick=${() => choose(key)}>${words}</button>`)}
  </div>`;

/** A link that opens in a new window. @param {{address: string, children: unknown}} props */
export const Outside = ({ address, children }) =>
  html`<a class="button" href=${address} target="_blank" rel="noopener">${children} <span aria-hidden="true">↗</span></a>`;

/** Headings of columns of numbers. @param {{titles: string[]}} props */
export const NumberHeads = ({ titles }) => titles.map((title) => html`<th key=${title} scope="col" class="number">${title}</th>`);

/** A part that can scroll sideways, also by keyboard. @param {{label: string, children: unknown}} props */
export const Scroll = ({ label, children }) =>
  html`<div class="scroll" role="group" aria-label=${label} tabindex="0">${children}</div>`;

/** The service's verdict on saving and quality. @param {{bill: any}} props `bill`: a bill, or a plan. */
export const Verdict = ({ bill }) => bill.verdict && html`<p class="small verdict-words">${bill.verdict}</p>`;
