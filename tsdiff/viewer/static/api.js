/** Where data comes from: the server beside the page, or the file that the page is. Both answer the same questions. */

const TOKEN = "tsdiff-token";

/** What the server answers in place of data: one line for people, and the HTTP status. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

class Server {
  constructor() {
    this.live = true;
    this.token = takeToken();
  }

  get steers() {
    return Boolean(this.token);
  }

  runs() {
    return this.get("/api/runs").then((answer) => answer.runs);
  }

  run(id) {
    return this.get(`/api/runs/${encodeURIComponent(id)}`);
  }

  tree(id, since) {
    return this.get(`/api/runs/${encodeURIComponent(id)}/tree${since ? `?since=${encodeURIComponent(since)}` : ""}`);
  }

  node(id, index) {
    return this.get(`/api/runs/${encodeURIComponent(id)}/node/${index}`);
  }

  curve(id) {
    return this.get(`/api/runs/${encodeURIComponent(id)}/curve`);
  }

  commands(id) {
    return this.get(`/api/runs/${encodeURIComponent(id)}/commands`).then((answer) => answer.commands);
  }

  questions() {
    return this.get("/api/questions").then((answer) => answer.questions);
  }

  /** The address of a node's picture. */
  image(id, index) {
    return `/api/runs/${encodeURIComponent(id)}/image/${index}`;
  }

  /** A page of thumbnails as something that can be drawn; null where there is none. */
  async atlas(id, page) {
    const response = await fetch(`/api/runs/${encodeURIComponent(id)}/atlas/${page}?size=64`, { cache: "no-cache" });
    if (!response.ok) throw new Refused(`the thumbnails were refused (${response.status})`, response.status);
    return createImageBitmap(await response.blob());
  }

  expand(id, wish) {
    return this.post(`/api/runs/${encodeURIComponent(id)}/expand`, wish);
  }

  stop(id) {
    return this.post(`/api/runs/${encodeURIComponent(id)}/stop`, {});
  }

  answer(question, score) {
    return this.post("/api/answers", { question, score });
  }

  async get(path) {
    return unpack(await fetch(path, { headers: { Accept: "application/json" }, cache: "no-cache" }));
  }

  async post(path, body) {
    const headers = { "Content-Type": "application/json", "X-Tsdiff-Token": this.token ?? "" };
    return unpack(await fetch(path, { method: "POST", headers, body: JSON.stringify(body) }));
  }
}

async function unpack(response) {
  let answer = null;
  try {
    answer = await response.json();
  } catch {
    throw new Refused(`the server's answer (${response.status}) cannot be read`, response.status);
  }
  if (!response.ok) throw new Refused(String(answer?.error ?? response.status), response.status);
  return answer;
}

/** The token that permits to steer: from the address, where it does not stay, or from before a reload. */
function takeToken() {
  const facts = new URLSearchParams(location.hash.slice(1));
  const token = facts.get("token");
  if (token) {
    sessionStorage.setItem(TOKEN, token);
    facts.delete("token");
    const rest = facts.toString();
    history.replaceState(null, "", location.pathname + location.search + (rest ? `#${rest}` : ""));
  }
  return token || sessionStorage.getItem(TOKEN);
}

/** A page that carries its run: `tsdiff export RUN run.html`. */
class Carried {
  constructor(data) {
    this.data = data;
    this.live = false;
    this.steers = false;
    this.leftOut = data.left_out;
  }

  async runs() {
    return this.data.runs;
  }

  async run() {
    return this.data.run;
  }

  async tree() {
    return this.data.tree;
  }

  async node(id, index) {
    const found = this.data.nodes[index];
    if (!found) throw new Refused("The details of this node were left out, to keep the file small.", 404);
    const { run, tree } = this.data;
    const record = tree.nodes[index];
    return { ...found, i: index, level: record.l, op: record.op, prompt: run.prompt, seed: run.seed, image: this.image(id, index) };
  }

  async curve() {
    return this.data.curve;
  }

  async commands() {
    return [];
  }

  async questions() {
    return [];
  }

  image(id, index) {
    return this.data.images[index] ?? null;
  }

  async atlas(id, page) {
    const address = this.data.atlas[page];
    if (!address) return null; // left out of the file
    const image = new Image();
    image.src = address;
    await image.decode();
    return image;
  }
}

/** The source of this page's data. */
export function openSource() {
  const carried = document.getElementById("tsdiff-data");
  return carried ? new Carried(JSON.parse(carried.textContent)) : new Server();
}
