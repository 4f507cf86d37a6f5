"""What Hugging Face Spaces starts: the pages of INSTRUCTLITE_RUN, a run in this repository or on the Hub (`python app.py` works too)."""

import os

from instructlite.errors import InstructLiteError, require

try:
    require("gradio", "app")
    from instructlite.commands.showing import serve_adapters
    from instructlite.feedback.app.server import Address

    # A Space decides who gets here. Whoever wants a login besides sets the secret INSTRUCTLITE_LOGIN to "name:password name:password".
    on_space = "SPACE_ID" in os.environ
    address = Address("0.0.0.0" if on_space else "127.0.0.1", int(os.environ.get("PORT", 7860)), behind_proxy=on_space)
    serve_adapters([os.environ.get("INSTRUCTLITE_RUN", "runs/demo")], address, os.environ.get("INSTRUCTLITE_LOGIN", "").split())
except InstructLiteError as error:
    raise SystemExit(f"instructlite: {error}") from None
