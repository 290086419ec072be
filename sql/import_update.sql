-- Replace what the file changes of users that exist, and count those of its users that still have their logins.
-- The users are locked first, in one order, so that two imports can't wait for each other. Locks are not touched, so
-- acquires and releases go on.
with known as materialized (
    select users.id
    from pg_temp.import_rows
    join users using (id)
    where import_rows.kind = 'updated'
        and users.login = import_rows.login
    order by users.id
    for update of users
),
changed as (
    update users
    set domain = import_rows.domain,
        labels = import_rows.labels,
        secret = coalesce(import_rows.secret, users.secret)
    from known
    join pg_temp.import_rows using (id)
    where users.id = known.id
),
unchanged as (
    select users.id
    from pg_temp.import_rows
    join users using (id, login)
    where import_rows.kind = 'unchanged'
)
select (select count(*) from known) as updated,
    (select count(*) from unchanged) as unchanged
