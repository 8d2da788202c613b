/** Projects of the caller, and their names. */

import { askAll } from "../api.js";
import { useEffect, useState } from "../lib.js";

/** The caller's projects; an empty list while they load. @returns {any[]} */
export function useProjects() {
  const [projects, setProjects] = useState([]);
  useEffect(() => {
    const ending = new AbortController();
    // Views work without them: the service then uses the caller's own project
    askAll("/v1/projects", ending.signal).then(setProjects, () => {});
    return () => ending.abort();
  }, []);
  return projects;
}

/** Name of a project, with its owner unless it is the owner's default one. @param {{name: string, owner: string}} project */
export const projectName = ({ name, owner }) => (name === owner ? name : `${name} of ${owner}`);

/** Name of a run's project; null if it is the default one of the run's owner. @param {any} run */
export const projectOf = (run) => (run.project.name === run.owner && run.project.owner === run.owner ? null : projectName(run.project));

/** Whether the caller may change a run. @param {any} run */
export const mayEdit = (run) => run.project.role !== "viewer";
