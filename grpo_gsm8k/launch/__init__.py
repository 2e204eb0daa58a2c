"""Rented GPUs: a pod is made, does one job, and is deleted, whatever happens in between.

`up.py` tells it from top to bottom. What the launcher owes, state by state:

| state  | deadline     | when it fails                            | the launcher owes                            |
|--------|--------------|------------------------------------------|----------------------------------------------|
| plan   |              | beyond --budget, no push rights          | to say so before anything costs money        |
| create | the client's | no capacity, a rule, 403                 | the next GPU; rounds with back-off           |
|        |              | 402, 422                                 | to stop                                      |
|        |              | reply lost, 5xx                          | to list by name, then adopt or ask again     |
| place  | --place_s    | still PROVISIONING                       | to delete it, and try the next GPU           |
| pull   | --pull_s     | still STARTING, or ERROR                 | the same                                     |
| ssh    | --ssh_s      | refused, or not the host key of the logs | the same                                     |
|        |              | no host key in the logs                  | to end, unless --insecure_host_key           |
| run    | the name's   | ssh drops, the port changes              | to ask for the address; the job goes on      |
|        |              | the pod dies or vanishes                 | a new pod from the last push, or the end     |
|        |              | budget or time used up                   | to stop the job, fetch what is there, delete |
| fetch  | --fetch_s    | ssh drops, this machine's disk is full   | to fetch the rest; what is not here is named |
|        |              | a link, a device                         | to skip and name it                          |
| end    | --delete_s   | a delete fails                           | to try again; at last to name what is left   |

Four layers see to the end: `finally` and the signal handlers here; `watchdog.py` in the pod; `reap`, which needs
nothing but the key, since a pod's name carries its deadline; and the budget, checked before the create.

    records.py   names, and what is known of a run on this machine     api.py      the provider's REST API, version 2
    up.py        the life of a run                                     shell.py    ssh: start, follow, list, send
    fetch.py     what is promised, what is here                        archive.py  a tar reader for hostile input
    manage.py    status, logs, attach, down, reap                      watchdog.py inside the pod, standard library only
    dry_run.py   what `up` would do
    plan.py      which GPU, how long, how much                         webhook.py  progress events
    keep.py      checkpoints pushed and restored, in the pod           publish.py  a model card and `push`
    sky.py       the same job as a SkyPilot task                       settings.py every setting

What the image owes, and `entrypoint.sh` does: `PUBLIC_KEY` into authorized_keys, sshd at port 22, the environment in
/etc/environment and in every ssh session, the host's ed25519 key in the log, then the arguments as the command; sh,
setsid, tar, GNU find and python on the path. Jobs that sample with vLLM need an image with EXTRAS="--extra vllm".

Nothing here has been tried against the live service: the tests use a fake one, as strict as its documentation. Its pods
are asyncssh servers (tests/test_launch.py) or containers of the real image (tests/test_image.py).
"""
