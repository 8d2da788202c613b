/** Data sets: text that was uploaded for runs. */

import { ask } from "../api.js";
import { html, useState } from "../lib.js";
import { usePolled } from "../polling.js";
import { now, when, whole } from "../words.js";
import { Question } from "./question.js";
import { Notice, NumberHeads, Scroll, Sheet } from "./small.js";

const REFRESH_SECONDS = 30;
const MOST_SHOWN = 200;
const HASH_LETTERS = 12;

export function Datasets() {
  const [version, setVersion] = useState(0);
  const { value, problem } = usePolled((signal) => ask(`/v1/datasets?limit=${MOST_SHOWN}`, { signal }), REFRESH_SECONDS, [version]);
  const [leaving, setLeaving] = useState(null);
  const [refused, setRefused] = useState(null);
  const answered = async (yes) => {
    setLeaving(null);
    if (!yes) return;
    try {
      await ask(`/v1/datasets/${leaving.id}`, { method: "DELETE" });
      setRefused(null);
      setVersion(version + 1);
    } catch (error) {
      setRefused(error);
    }
  };
  const items = value?.items ?? [];
  return html`
    <${Sheet} title="Data sets" note=${value?.next_cursor ? `the newest ${MOST_SHOWN}` : ""}>
      <${Notice} problem=${refused ?? problem} />
      <p class="soft small">Text that runs read as <code>dataset://NAME@sha256:HASH</code>. <code>moedisco datasets upload</code> adds one.</p>
      ${items.length > 0 && html`
        <${Scroll} label="Data sets">
          <table>
            <thead><tr><th scope="col">Name</th><th scope="col">Hash</th><th scope="col">Owner</th><${NumberHeads} titles=${["Files", "MB"]} />
              <th scope="col">Uploaded</th><th scope="col"><span class="unseen">Actions</span></th></tr></thead>
            <tbody>${items.map((each) => html`
              <tr key=${each.id}>
                <th scope="row">${each.name}</th>
                <td><code title=${each.hash}>${each.hash.slice(0, HASH_LETTERS)}</code></td>
                <td>${each.owner}</td>
                <td class="number">${whole(each.count)}</td>
                <td class="number">${whole(Math.ceil(each.bytes / 1e6))}</td>
                <td class="soft">${when(each.created, now())}</td>
                <td>${each.role !== "viewer" && html`
                  <button onClick=${() => setLeaving(each)}>Delete<span class="unseen"> ${each.name}</span></button>`}</td>
              </tr>`)}</tbody>
          </table>
        </${Scroll}>`}
      ${leaving && html`
        <${Question} title=${`Delete ${leaving.name}?`} yes="Delete" danger answer=${answered}>
          <p>The text is deleted, unless another data set has it. Runs that have read it stay.</p>
        </${Question}>`}
    </${Sheet}>`;
}
