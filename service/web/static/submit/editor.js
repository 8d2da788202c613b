/** YAML editor with line numbers and a list of mistakes. */

import { html, useId, useRef } from "../lib.js";

/**
 * @param {{label: string, text: string, change: (text: string) => void, mistakes: import("./yaml.js").Mistake[]}} props
 */
export function Editor({ label, text, change, mistakes }) {
  const area = useRef(null);
  const gutter = useRef(null);
  const list = useId();
  const marked = new Set(mistakes.map((mistake) => mistake.line));
  const lines = text.split("\n");
  const scrolled = () => {
    gutter.current.style.transform = `translateY(${-area.current.scrollTop}px)`;
  };
  const goTo = (line) => {
    const start = lines.slice(0, line - 1).reduce((sum, each) => sum + each.length + 1, 0);
    area.current.focus();
    area.current.setSelectionRange(start, start + lines[line - 1].length);
    area.current.scrollTop = (line - 4) * parseFloat(getComputedStyle(area.current).lineHeight);
  };
  return html`
    <div class="editor">
      <div class="gutter" aria-hidden="true">
        <ol ref=${gutter}>${lines.map((_, index) => html`<li class=${marked.has(index + 1) ? "wrong" : ""}>${index + 1}</li>`)}</ol>
      </div>
      <textarea ref=${area} aria-label=${label} spellcheck="false" autocapitalize="off" autocomplete="off" wrap="off"
        aria-invalid=${String(mistakes.length > 0)} aria-describedby=${list}
        value=${text} onInput=${(event) => change(event.target.value)} onScroll=${scrolled}></textarea>
    </div>
    <ul id=${list} class="mistakes" aria-live="polite">
      ${mistakes.map((mistake) => html`
        <li key=${mistake.field + mistake.message}>
          ${mistake.line !== null && html`
            <button type="button" class="plain" onClick=${() => goTo(mistake.line)}>Line ${mistake.line}</button>`}
          <span>${mistake.field && html`<code>${mistake.field}</code> `}${mistake.message}</span>
        </li>`)}
    </ul>`;
}
