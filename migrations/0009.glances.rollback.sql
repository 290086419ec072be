drop index "a login is unique within a project and env";

alter table users add constraint "a login is unique within a project and env" unique (project_id, env, login);

drop index locks_quarantined;

drop index history_by_end;
