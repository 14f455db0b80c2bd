"""The Python API: functions that a notebook or script calls; `import vlm_sft` offers them by name."""
