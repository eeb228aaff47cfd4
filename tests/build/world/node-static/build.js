const fs = require("fs");
const ms = require("ms");
fs.mkdirSync("public");
fs.writeFileSync("public/index.html", `<h1>${process.env.TITLE}</h1>${ms(60000)}\n`);
