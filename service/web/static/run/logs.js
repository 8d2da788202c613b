/** The end of a log of the run, followed while it grows. */

import { ask, askText, followText } from "../api.js";
import { html, useEffect, useLayoutEffect, useRef, useState } from "../lib.js";
import { Notice, Sheet } from "../parts/small.js";
import { usePolled, whileVisible } from "../polling.js";

const EMPTY = "The log is empty so far.";
const TAIL = 200;
const KEPT_LINES = 2000;
const LIST_SECONDS = 10;
const RETRY_MILLISECONDS = 2000;
/** Terminal colour codes. */
const COLOURS = /\u001b\[[0-9;]*m/g;

/** @param {{id: string, active: boolean}} props `active`: whether the run has a driver, whose log can be followed. */
export function Logs({ id, active }) {
  const { value: list } = usePolled((signal) => ask(`/v1/runs/${id}/logs`, { signal }), LIST_SECONDS, [id]);
  const [name, setName] = useState("driver");
  const [follow, setFollow] = useState(true);
  const names = (list?.items ?? []).map((file) => file.name);
  if (!names.length) return null;
  const chosen = names.includes(name) ? name : names[0];
  const following = follow && active;
  const path = `/v1/runs/${id}/logs/${encodeURIComponent(chosen)}`;
  const tools = html`
    <div class="actions">
      <label class="follow">
        <input type="checkbox" checked=${follow} onChange=${(event) => setFollow(event.target.checked)} />Follow
      </label>
      <select aria-label="Log" value=${chosen} onChange=${(event) => setName(event.target.value)}>
        ${names.map((each) => html`<option key=${each} value=${each}>${each}</option>`)}
      </select>
    </div>`;
  return html`
    <${Sheet} title="Log" tools=${tools} span="half">
      <${LogText} key=${`${chosen} ${following}`} path=${path} follow=${following} stick=${follow} />
    </${Sheet}>`;
}

function LogText({ path, follow, stick }) {
  const [text, setText] = useState("");
  const [problem, setProblem] = useState(null);
  const box = useRef(null);
  const atEnd = useRef(true);
  useEffect(() => {
    const begin = () => {
      const ending = new AbortController();
      read(path, follow, ending.signal, setText).catch((error) => error.name !== "AbortError" && setProblem(error));
      return () => ending.abort();
    };
    return follow ? whileVisible(begin) : begin();
  }, []);
  useLayoutEffect(() => {
    if (stick && atEnd.current && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [text]);
  const scrolled = ({ target }) => {
    atEnd.current = target.scrollHeight - target.scrollTop - target.clientHeight < 24;
  };
  return html`
    <${Notice} problem=${problem} />
    <pre class="log" ref=${box} tabindex="0" role="group" aria-label="Log text" onScroll=${scrolled}>${text || EMPTY}</pre>`;
}

/** Read the tail and follow the log; after a lost connection or a hidden page, start from the tail again. */
async function read(path, follow, signal, show) {
  if (!follow) {
    show(tidy(await askText(`${path}?tail=${TAIL}`, { signal })));
    return;
  }
  while (!signal.aborted) {
    let text = "";
    try {
      await followText(`${path}?tail=${TAIL}&follow=true`, signal, (piece) => {
        text = tidy(text + piece);
        show(text);
      });
    } catch (error) {
      if (error.name === "AbortError" || error.status) throw error;
    }
    await new Promise((done) => setTimeout(done, RETRY_MILLISECONDS));
  }
}

const tidy = (text) => text.replace(COLOURS, "").split("\n").slice(-KEPT_LINES).join("\n");
