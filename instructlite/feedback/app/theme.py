"""How the pages look: Gradio's base theme with the fonts of the system (a web font would be a request to somebody else)."""

from pathlib import Path

import gradio as gr

STATIC = Path(__file__).parent / "static"
HEAD = '<meta name="color-scheme" content="light dark"><script src="/ui/keys.js" defer></script><link rel="icon" href="/ui/icon.svg">'
SYSTEM = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    made = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=SYSTEM, font_mono=MONO, radius_size="md")
    return made.set(
        body_background_fill="#f6f7f9",
        body_background_fill_dark="#0f141b",
        block_background_fill="#ffffff",
        block_background_fill_dark="#171e27",
        block_border_color="#dfe3e8",
        block_border_color_dark="#2b3542",
        input_background_fill="#ffffff",
        input_background_fill_dark="#10161d",
        input_border_width="1px",
        input_border_color="#b6bec9",
        input_border_color_dark="#435064",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_dark="#222c38",
    )
