-- Make the users that are new.
-- A plain insert (11 -> 8 us a row against `on conflict do nothing`): should another call take a login in this
-- very moment, the statement fails, import_overtaken.sql finds that user, and it is tried again.
insert into users (id, created_at, project_id, env, domain, login, labels, secret)
select id, clock_timestamp(), project_id, env, domain, login, labels, secret
from pg_temp.import_rows
where kind = 'created'
order by line
