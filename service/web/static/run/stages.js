/** Stages of a run and their status. */

import { html } from "../lib.js";
import { Sheet } from "../parts/small.js";
import { useNow } from "../polling.js";
import { duration } from "../words.js";

const MARKS = {
  done: html`<path d="M4 8.5 7 11.5 12.5 5" />`,
  reused: html`<path d="M4 8.5 7 11.5 12.5 5" />`,
  failed: html`<path d="M5 5l6 6M11 5l-6 6" />`,
  running: html`<circle cx="8" cy="8" r="3" class="dot" />`,
  waiting: null,
};

/** @param {{stages: import("./fold.js").Stage[], active: boolean}} props `active`: whether the run has a driver. */
export function StageTrack({ stages, active }) {
  const now = useNow();
  if (!stages.length) return null;
  return html`
    <${Sheet} title="Stages">
      <ol class="track">
        ${stages.map((stage) => html`
          <li key=${stage.name} class=${stage.status} aria-current=${stage.status === "running" ? "step" : null}>
            <svg viewBox="0 0 16 16" aria-hidden="true"><circle cx="8" cy="8" r="7" class="ring" />${MARKS[stage.status]}</svg>
            <span class="name">${stage.name}<span class="unseen">, ${stage.status}</span></span>
            <span class="time">${timeWords(stage, active ? now : null)}</span>
          </li>`)}
      </ol>
    </${Sheet}>`;
}

function timeWords(stage, now) {
  if (stage.status === "reused") return "reused";
  if (stage.seconds !== null) return duration(stage.seconds);
  if (stage.status !== "running" || stage.started === null || now === null) return "";
  return duration(Math.max(0, Math.floor(now - stage.started)));
}
