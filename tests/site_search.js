// Asks the search of a built site by the worker that its own pages run: node site_search.js SITE QUERY ...
// Prints for each query the places that it finds, best first, as the reader would see them.
const fs = require("fs"), vm = require("vm"), [site, ...queries] = process.argv.slice(2);
const workers = `${site}/assets/javascripts/workers`, answers = [];
let ask;
globalThis.self = globalThis;
globalThis.addEventListener = (_, listener) => { ask = (type, data) => listener({ data: { type, data } }); };
globalThis.postMessage = message => { if (message.type === 3) answers.push(message.data.items); };
globalThis.importScripts = () => {};
const worker = fs.readdirSync(workers).find(name => name.endsWith(".js"));
vm.runInThisContext(fs.readFileSync(`${workers}/${worker}`, "utf8"));
(async () => {
  const index = JSON.parse(fs.readFileSync(`${site}/search/search_index.json`, "utf8"));
  await ask(0, { ...index, options: { suggest: false } });
  for (const query of queries) await ask(2, query);
  console.log(JSON.stringify(answers.map(pages => pages.map(([best]) => best.location))));
})();
