/** A modal dialog with a question. */

import { html, useEffect, useId, useRef } from "../lib.js";

/**
 * @param {{title: string, yes: string, danger?: boolean, ready?: boolean, answer: (yes: boolean) => void, children: unknown}} props
 *   `ready`: whether yes is possible. `answer` is called once; Escape means no. A dangerous question begins at "Back", so that Enter does no harm.
 */
export function Question({ title, yes, danger = false, ready = true, answer, children }) {
  const dialog = useRef(null);
  const heading = useId();
  useEffect(() => {
    const asker = document.activeElement;
    dialog.current.showModal();
    return () => asker?.focus?.();
  }, []);
  const cancelled = (event) => {
    event.preventDefault();
    answer(false);
  };
  return html`
    <dialog ref=${dialog} aria-labelledby=${heading} onCancel=${cancelled}>
      <h2 id=${heading}>${title}</h2>
      ${children}
      <div class="actions">
        <button type="button" autofocus=${danger} onClick=${() => answer(false)}>Back</button>
        <button type="button" class=${danger ? "danger" : "primary"} disabled=${!ready} onClick=${() => answer(true)}>${yes}</button>
      </div>
    </dialog>`;
}
