-- Make the pools that are new in the file.
insert into pools (project_id, env, domain)
select distinct project_id, env, domain
from pg_temp.import_rows
order by project_id, env, domain
on conflict do nothing
