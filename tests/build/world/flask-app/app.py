import sys

from flask import Flask

app = Flask(__name__)


@app.route("/")
def hello() -> str:
    return "hello from flask\n"


if sys.argv[1:] == ["--check"]:
    print(app.test_client().get("/").text, end="")
else:
    app.run(host="0.0.0.0")
