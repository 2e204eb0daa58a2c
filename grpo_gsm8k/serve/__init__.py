"""The training service: this project's learner and sampler behind HTTP.

    store.py   SQLite journal: a request is accepted when it is on disk
    core.py    Service: numbers, orders and answers requests; the engine thread does the work
    app.py     the web application: keys, limits, and the routers of the wires (tinker, openai, rollouts, page)

Nothing here imports the `tinker` package, and nothing heavy is imported before a server starts.
"""
