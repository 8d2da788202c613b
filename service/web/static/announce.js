/** Words for screen readers; sighted readers see what they are about. */

/** @param {string} words */
export function announce(words) {
  document.getElementById("announcer").textContent = words;
}
