"""The `shapes` world: small pictures simple enough that a program can tell whether they obey their prompt.

`geometry` says what a picture holds and `render` draws it; `grammar` writes and reads prompts, `facts` takes them apart;
`heldout` names the compositions that training never shows and `scenes` makes pictures of prompts; `checker` looks at
pictures, `oracle` is the verifier built on it, `suites` are the prompts to search for.
"""
