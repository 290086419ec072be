-- Lines that were staged as new, but whose login another call took first.
select import_rows.id as staged_id, users.id, import_rows.secret
from pg_temp.import_rows
join users using (project_id, env, login)
where import_rows.kind = 'created'
    and users.id <> import_rows.id
