-- Lines that were staged for a user that no longer has that login: deleted or renamed meanwhile.
select import_rows.line, import_rows.id, import_rows.secret
from pg_temp.import_rows
where import_rows.kind <> 'created'
    and not exists (
        select
        from users
        where users.id = import_rows.id
            and users.login = import_rows.login
    )
order by import_rows.line
