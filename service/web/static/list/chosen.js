/** What can be done with the runs that are chosen in the list. */

import { ask } from "../api.js";
import { html, useState } from "../lib.js";
import { mayEdit } from "../parts/projects.js";
import { Question } from "../parts/question.js";
import { Notice } from "../parts/small.js";
import { plural } from "../words.js";

/** Maximum number of runs that are compared. */
const COMPARED = 5;

/** @param {{runs: any[], done: (left: string[]) => void}} props `done`: called after an action with the runs that it left as they were. */
export function ChosenRuns({ runs, done }) {
  const [asking, setAsking] = useState("");
  const [tag, setTag] = useState("");
  const [problem, setProblem] = useState(null);
  const each = async (method, body) => {
    setProblem(null);
    const left = [];
    for (const run of runs) {
      try {
        await ask(`/v1/runs/${run.id}`, { method, body });
      } catch (error) {
        left.push(run.id);
        setProblem(new Error(`${run.name}: ${error.message}`));
      }
    }
    done(left);
  };
  const answered = (yes) => {
    setAsking("");
    if (!yes) return;
    if (asking === "delete") each("DELETE");
    else each("PATCH", { tags: tagsIn(tag) });
  };
  const editable = runs.length > 0 && runs.every(mayEdit);
  const names = plural(runs.length, "run");
  return html`
    <${Notice} problem=${problem} />
    ${runs.length > 0 && html`
      <div class="chosen-runs" role="group" aria-label="Chosen runs">
        <span>${names} chosen</span>
        ${runs.length >= 2 && runs.length <= COMPARED && html`
          <a class="button" href=${`#/compare/${runs.map((run) => run.id).join(",")}`}>Compare ${names}</a>`}
        ${editable && html`
          <button onClick=${() => setAsking("tag")}>Tag</button>
          <button class="danger" onClick=${() => setAsking("delete")}>Delete</button>`}
        <button class="plain" onClick=${() => done([])}>Choose none</button>
      </div>`}
    ${asking === "tag" && html`
      <${Question} title=${`Tag ${names}`} yes="Save" ready=${tagsIn(tag) !== null} answer=${answered}>
        <div class="field asked">
          <label for="tags">Tags</label>
          <input id="tags" aria-describedby="tags-hint" autocomplete="off" value=${tag} onInput=${(event) => setTag(event.target.value)} />
          <span class="hint" id="tags-hint">such as team:vision draft:yes; -draft removes a tag</span>
        </div>
      </${Question}>`}
    ${asking === "delete" && html`
      <${Question} title=${`Delete ${names}?`} yes="Delete" danger answer=${answered}>
        <p>The history and the files of ${runs.map((run) => run.name).join(", ")} are removed for good. Active runs stay.</p>
      </${Question}>`}`;
}

/** Changes of tags in a text; null if a word is none. @param {string} text @returns {Record<string, string | null> | null} */
function tagsIn(text) {
  const words = text.split(/[\s,;]+/).filter(Boolean);
  const changes = words.map((word) => (word.startsWith("-") ? [word.slice(1), null] : word.split(/:(.*)/s).slice(0, 2)));
  const correct = ([key, value]) => key !== "" && (value === null || value);
  return words.length > 0 && changes.every(correct) ? Object.fromEntries(changes) : null;
}
