// Blocks of data: each is decoded once, when something of it is looked at.

const decoded = new Map();

/** Return what a block holds. */
function block(name) {
  if (!decoded.has(name)) decoded.set(name, decode(name));
  return decoded.get(name);
}

async function decode(name) {
  const element = document.getElementById(`block-${name}`);
  const bytes = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
  element.remove();
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

/** Return one entry of a list that is cut into blocks. */
async function entry(list, number) {
  const part = await block(`${list}-${Math.floor(number / head.rows)}`);
  return part[number % head.rows];
}

/** Return a whole list that is cut into blocks. */
async function entries(list, count) {
  const names = Array.from({ length: Math.ceil(count / head.rows) }, (_, number) => `${list}-${number}`);
  return (await Promise.all(names.map(block))).flat();
}

/** Return the data URL of a picture. */
async function picture(number) {
  const of = head.pictures.findLastIndex((first) => first <= number);
  return `data:image/${(await block(`pictures-${of}`))[number - head.pictures[of]]}`;
}

// What all of the page needs at once, filled when it starts.
let head, tests, training, listed;
