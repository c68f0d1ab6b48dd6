"""Pages for people: jobs, a job as it runs, its report, its edits to decide on. They work without scripts, by reloading."""

from service.http.pages.routes import router

__all__ = ["router"]
