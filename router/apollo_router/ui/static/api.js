// Requests to this server, and to no other. Relative, so that a proxy may put everything below a path.

const BASE = new URL("..", location.href);

export class ApiError extends Error {
  constructor(status, error) {
    super(error.param ? `${error.param}: ${error.message}` : error.message);
    this.status = status;
    this.code = error.code;
  }
}

export async function api(method, path, body, headers = {}) {
  let response;
  try {
    response = await fetch(new URL(path, BASE), {
      method,
      body: body === undefined ? undefined : JSON.stringify(body),
      headers: { "X-Apollo-UI": "1", ...(body === undefined ? {} : { "Content-Type": "application/json" }), ...headers },
      credentials: "same-origin",
      cache: "no-store",
      redirect: "error",
    });
  } catch {
    throw new ApiError(0, { message: "the server does not answer", code: "unreachable" });
  }
  const text = await response.text();
  let data = null;
  try {
    data = JSON.parse(text);
  } catch { /* no JSON: an empty answer, or a proxy's page */ }
  if (response.ok) return data;
  // vLLM's own errors have the same object.
  const error = new ApiError(response.status, data?.error ?? { message: `HTTP ${response.status}`, code: "http" });
  if (response.status === 401) dispatchEvent(new CustomEvent("apollo-logged-out"));
  throw error;
}

export async function metricsText() {
  const response = await fetch(new URL("metrics", BASE), { cache: "no-store", redirect: "error" });
  return response.ok ? response.text() : null;
}

// Server-sent events of the page. `on(name, data)`; onState(is_connected).
export function listen(on, onState) {
  let source = null;
  let again = null;
  const open = () => {
    source = new EventSource(new URL("train/ui/events", BASE));
    source.onopen = () => onState(true);
    source.onerror = () => {
      onState(false);
      // A session that is over ends in CLOSED: the request below finds out, and shows the login.
      if (source.readyState === EventSource.CLOSED) {
        clearTimeout(again);
        again = setTimeout(() => api("GET", "train/ui/session").then(open, (error) => error.status === 401 || open()), 2000);
      }
    };
    for (const name of ["beat", "job", "end"]) source.addEventListener(name, (event) => on(name, JSON.parse(event.data)));
  };
  open();
  return () => {
    clearTimeout(again);
    source.close();
  };
}
