const http = require("http");
const ms = require("ms");
const isNumber = require("is-number");
const server = http.createServer((request, answer) => answer.end(`${isNumber(5)} ${ms("2 days")}\n`));
server.listen(process.argv.includes("--check") ? 0 : 3000, "127.0.0.1", () => {
  if (!process.argv.includes("--check")) return;
  http.get({ port: server.address().port }, (answer) => {
    answer.pipe(process.stdout);
    answer.on("end", () => server.close());
  });
});
